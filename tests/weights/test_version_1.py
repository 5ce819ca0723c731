"""Weights of layout version 1, as the library wrote them before version 2 was made: they load for good."""

import base64
import pickle
import zlib

import numpy as np
import pytest
from cases import assert_same_weight, bits

import pyda8w4

F32 = np.float32

# zlib and base85 of a file with the weights of `arguments`, and of a pickle (protocol 4) of the second.
FILE = (
    "c-qC4Uu;uV9LIm{Zrj_xcflp@VUlaXxZTsj?d@%QJNIxS3(jPQ5oS`POV@0LEp%(McKpraeK0yAnk|a(#zF$F=WGia188_C_#h@c428s)pncFdqA"
    "?3EpfCEn-Qr*jB;5n2x%Zs@e)oLN_xI=K9^#-nj`~xnp-eH|pDw0TDSxYY)Spcs&W#pv>F-Z#2i4$kSlO@o1LCqHbs#fR7|acu4}?tf!OY;kfnve"
    "@e>CaOXVZhjNfVUx7Y5S#jJe(u4v1P$Kur4gjpRo2slwoqs$DfrM=~S1R6aL2Tr^FZY3dv43oFZzzFdE%V6MaQa3~~4BXPxiq|lenF58u8Jg&tev"
    "8s7=Xvr9k$3n6aSEFNNrahg_J}N2_5JU3Q$r>KbW=(5u@7_YDSUsXRGMag;SS1_{hvKRli99S;Q#4f$DXYZBl~_cLYSF6oNPd~1MxyaZJi6*wMGb"
    "43qR6rE*x1+u`A=1KRI4Iup-^0o#iD+UeW@Z_s>-VM?JpkAXUyl`)XeSGe3<D71w_njRK<k&tL?CSsOgh2Q;OEJf?JB{VczyobPZrwSqq3X^hTl&"
    "A~74QfEdpz;Mz0<p-WS%G%WQ~L~AO0T(n3Eh_R^lA8xH^UtJyU5^-&T2*V79BFYN#f1`bT?vR5tRbCOe;;mJoi9={Cz9JDD@nPWW+SB7==4%>?n>"
    "85|A02|v>ae?P9*@NbwG6=xyxVCL1eecR%YHo$m!K7D9{MYA0X~Cuj7vH|ZyDfh8J@wgp7XU||K*+T{0M2*7dP$t@vnPtd@;0*d+Xxu>vul>+$ay"
    "Eb9XPao=dnU3wOD#q2l0{G9NpB&->-%4(rc7*6(k9_`x6BH~eGoI=%DTA^&rO$(hDaPE5UU^TzKxZ(lj@(5}5?-SzITXMAtR6PA2<V|%dk=GP}T|"
    "J}8zZO@&_13j0w0o?uyV3P%4<8grYV*qmp0j^#JxbYjnt^EMoe*)OO72w4gfR_b;Kd%5>903@3AAqwvTo%FM6zaS+)!*v$@E(ugsPplBE&Cm)$BQ"
    "#xWBz+t1F5u#te&-zGF_lDsYnKCU^2;*EbAnqRAl8+Gf6Uzb&vq@kO1SzH3=kxRa!b(S<*=p(MuYUiBU?BQ<6+8^qSN}Iti2-i7pw_2{KihmM%#R"
    "tW2AUhIb%cbX*eY1m%dxCTN14m)c1lnZN?bnUD?<l}%BRc98SZ0O=r$)I)UA%ce>O&9lu6;6Ck@#wDICNHVLv|MJvmuBWx{FS03AzK$0_ZruWKa~"
    "8@QW&su?Fl<4noSg;ZdAueAV4TFRyNv4uUJks@%z*eQ&L7Q!F3f>Zn1$ZcK@c5tP~IJc-cv!)(>T9}^RXZpQ^@#k28<H{fSq{8YdAL}Gk|jnIdiz"
    "?8HnEmpT+y%MiN+Oofy~`NtPh<lFme0FUiupG>&rz(`lI|NRi0ccT==%cHZ<NRxOLY*o{3aVy8CY-utwZ@MtrrUMk~nL8{Pknq?JQkwmOfBl$r}k"
    "O`V(AhodtI!_z1$Ht{aT5jP8hh2G}HZz^|vT3Ov`@deQlr+}Jn$gq7JgBS-yAq(AHK5K0>~FoLo8`%(q^_g>#`HXGTF3q_I)NFheZNoeSh+gR<`!"
    "(c+iUmv1l}&VJe=Lh+v+%{)#7w}IKk(z+v)_j-RZS@@r%iOoSc()@^&j{ak|_V7iSkdyv1e(yT@Sx3ukfrTz1~#<?VL&lfSE8i||B$ou%%H{(k`)"
    ">}#$"
)
PICKLE = (
    "c-qBPU2NM_6h3ww$4Q*H8Wj|&n+zQyy|?KysGv-JuxK?ZQcBDEkU^(3ZBr60ZLIt-I)U&5Y^gA))jYPhMUxoKy=^ri!~pFf8xIs|4;^e0LK@@&L?"
    ";lc_OimuI8BAv!+xahfn!}CE57IW%lZ6$wxr{e3e>~a%<1t&=b?`FxS1F`m>hR(C7w%;7Sow==a>@}-gZK^Fy%yBY~i32_1V7HbJ?O9&!-P3ov38"
    "{^J9rjGCp3IHj`L7I+4jH3cH_iY~SHzE*m$q>8XO#Z~Ie;d^|fbkxv%#PN}%j)IF9RPv#x_;i=-JIo%!~%jS~plf_ISoyg@9(~hkoj<M`izK|=96"
    "%dQ<uJ3eg&(!$l7Q_edIo-mjbJTgo2}Omd7<EOBqfV;9c5gz$GO@VZnJI1VaM{9JPJe&@i?=Z9rzjMh(V6Eh0YE$x?78&IyF+G<hK#kAeLwzn^QF"
    "%wyQNppUAuJM`P8bW64@J{?>Q6m&E;=MyLK1S?N#Mj`)1(FxtGPC4~XAi{qTc7_HMf+51bnOcJlFu(!&c)A001mzjFEa!D|=JdODY%5ceJV^>px^"
    "=VF5S^p2iz-<7XV?EHJ6rR%lpb8j3t-wkl>D}WZnvcm@GnE_Zj1aR>pz~$cnt{w!~`xC(aT>y_Q06eJy{CNT3Tn-@hK7b^9e1hijYOa6?TL{ssDy"
    "ph^TtP+IO1%g11Tb%@7{fs(Y`OkI<(-t4+P1-Ns_}Mib>#L@Wb~=q8ST0&qa(bL)>?Jmz`JObt+EKM5sNnR2sLSj_fee`c(oFu!(8IMw2i8?jZ1W"
    "y0I_(jwU1YcL7S;j>7)^ARbuociLe@5Ce5^uLZyis#F~%Ma%G-;K^l3Lg=i<9fex?|(b+7MsLp3ujGrYv)Wn{^+py0pd6RbVGSgWvJxfxwm##6D8"
    "gzu0D;6{PP7binMo5V$bd^LnY&lG3g&Nq_>kGV$$hTf!XH?1;C-2Osex%OkM8|(@rdsdBB_Nj&+0zbiWf7{|76DcXSne>?K3)Xt5nOX^V4XlsoX6"
    "`JE)TBL3!s03`Pd>D+7ej#MHo312Hmp+)%{@@IT;2cf%z!rnJ`#o?D5?KSjXD{2Jsm$U=Cr=Hq3GCvxL_Q2mPBc{0~u|rR%VHA8Dj-GrQFGI}EeC"
    "8q`!#a!GE#=2rXxIT+LwS@Wrq>{Z+@$twz8zba`#kL-47e%Tuk16oj2RIlV!yoxMJg4gF4e3GoGir^MORy_g;lHd>eWJL%lvg{Au^PdC+?Vk5tg6"
    "sa1@cjEVx%)Iin<mgjV<<L*S}4w89-}M7;5us{5wb!`n0vXwsw_qeG=kzUv+9QY=hsj=88n0;G!7l@q8V$~SszvKH;WmSDjut(#!4*1Yph0e6iO5"
    "QfyC%68|FZ|_$pgrO(^sdS!2~!iArb<>ny|#KEmfo1Da3+sZ~086A$5?F0LZ70kj5yA>N2M8_{Hp)*)`vHPZ0_BDCgLSn~ta53pIB*n_>e#SL!S{"
    "{bZ(09O"
)


def arguments():
    """By name: arguments of prepack."""
    rng = np.random.default_rng(1)

    def weight(n, k, group_size, size, zps, has_offsets):
        shape = (n, -(-k // group_size))
        codes = rng.integers(0, 16, (n, k), np.uint8)
        scales = (rng.integers(-64, 65, shape) / 64).astype(F32) * F32(size)
        offsets = (rng.integers(-64, 65, shape) / 64).astype(F32) * F32(size) if has_offsets else None
        zps = rng.integers(0, 16, shape, np.int8) if zps is None else np.full(shape, zps, np.int8)
        return {"codes": codes, "scales": scales, "zps": zps, "offsets": offsets, "group_size": group_size}

    return {"plain": weight(3, 8, 4, 1, 8, False), "all": weight(35, 10, 4, 2.0**-40, None, True)}


def of(constant):
    return zlib.decompress(base64.b85decode(constant))


@pytest.mark.pitfall("torchao #1117, #1389", "packing changed, old files load wrong")
def test_a_file_of_version_1(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(of(FILE))
    for verify in (True, False):
        loaded = pyda8w4.load(path, verify=verify)
        assert list(loaded) == ["plain", "all"]
        for name, wanted in arguments().items():
            assert_same_weight(loaded[name], pyda8w4.prepack(**wanted))
    pyda8w4.save(path, loaded)
    assert b'"layout_version": "2"' in path.read_bytes()
    for name, weight in pyda8w4.load(path).items():
        assert_same_weight(weight, loaded[name])


def test_products_are_those_of_version_1(kernel, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(of(FILE))
    x = F32([[1, -2, 3, -4, 5, -6, 7, -8, 9, -10]])
    found = {name: pyda8w4.linear(x[:, : weight.shape[1]], weight) for name, weight in pyda8w4.load(path).items()}
    # What the library gave that wrote the file.
    assert {name: zlib.crc32(bits(y).tobytes()) for name, y in found.items()} == {
        "plain": 2972220971,
        "all": 1145916716,
    }


def test_a_pickle_of_version_1():
    weight = pickle.loads(of(PICKLE))
    assert_same_weight(weight, pyda8w4.prepack(**arguments()["all"]))
    assert weight.bits == 4 and weight.super_size == 0 and weight.table is weight.perm is weight.factors is None


@pytest.mark.parametrize("old, new", [(b'"all\\": {\\"shape\\": [35, 10]', b'"all\\": {\\"shape\\": [36, 10]')])
def test_a_changed_file_of_version_1_is_refused(tmp_path, old, new):
    path = tmp_path / "weights.safetensors"
    data = of(FILE)
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match="damaged"):
        pyda8w4.load(path)
    for at in (len(data) - 1, len(data) - 1000, len(data) - 1900):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            pyda8w4.load(path)
