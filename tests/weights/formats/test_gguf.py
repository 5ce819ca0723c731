"""Blocks of ggml's types stand for what ggml-quants.c says they do, weight for weight."""

import re

import numpy as np
import pytest
from cases import assert_same_bits
from readers import reader

from pyda8w4 import linear
from pyda8w4.formats import gguf
from pyda8w4.formats._layer import Layer

# ---- the definition: one weight of a block ------------------------------------------------------
# From the structs of ggml-common.h and the functions dequantize_row_* of ggml-quants.c: what weight k of a block is.

F32 = np.float32


def half(block, at):
    return F32(np.frombuffer(block[at : at + 2], "<f2")[0])


def signed(byte):
    return byte - 256 if byte > 127 else byte


def nibble(block, at, k):
    """Of 32 weights in 16 bytes: the first half is in the lower nibbles."""
    return block[at + k % 16] >> 4 * (k // 16) & 15


def wide_nibble(block, at, k):
    """The same of 64 weights in 32 bytes, again and again."""
    return block[at + 32 * (k // 64) + k % 32] >> 4 * (k // 32 % 2) & 15


def crumb(block, at, k):
    """Of 128 weights in 32 bytes, 2 bits each, again and again."""
    return block[at + 32 * (k // 128) + k % 32] >> 2 * (k // 32 % 4) & 3


def scale_and_minimum(block, j):
    """ggml's get_scale_min_k4."""
    q = block[4:16]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4


def with_minimum(block, code, k):
    scale, minimum = scale_and_minimum(block, k // 32)
    return half(block, 0) * F32(scale) * F32(code) - half(block, 2) * F32(minimum)


def q1_0(block, k):
    return half(block, 0) if block[2 + k // 8] >> k % 8 & 1 else -half(block, 0)


def q2_k(block, k):
    both = block[k // 16]
    return half(block, 80) * F32(both & 15) * F32(crumb(block, 16, k)) - half(block, 82) * F32(both >> 4)


def q3_k(block, k):
    group = k // 16
    low = block[96 + group] & 15 if group < 8 else block[88 + group] >> 4
    scale = (low | (block[104 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
    code = crumb(block, 32, k) - (0 if block[k % 32] & 1 << k // 32 else 4)
    return half(block, 108) * F32(scale) * F32(code)


def q4_0(block, k):
    return half(block, 0) * F32(nibble(block, 2, k) - 8)


def q4_1(block, k):
    return half(block, 0) * F32(nibble(block, 4, k)) + half(block, 2)


def q4_k(block, k):
    return with_minimum(block, wide_nibble(block, 16, k), k)


def fifth_bit(block, at, k):
    return (int.from_bytes(block[at : at + 4], "little") >> k & 1) << 4


def q5_0(block, k):
    return half(block, 0) * F32((nibble(block, 6, k) | fifth_bit(block, 2, k)) - 16)


def q5_1(block, k):
    return half(block, 0) * F32(nibble(block, 8, k) | fifth_bit(block, 4, k)) + half(block, 2)


def q5_k(block, k):
    return with_minimum(block, wide_nibble(block, 48, k) | (block[16 + k % 32] >> k // 32 & 1) << 4, k)


def q6_k(block, k):
    part, at, which = k // 128, k % 32, k % 128 // 32
    low = block[64 * part + at + 32 * (which % 2)] >> 4 * (which // 2) & 15
    high = block[128 + 32 * part + at] >> 2 * which & 3
    scale = signed(block[192 + k // 16])
    return half(block, 208) * F32(scale) * F32((low | high << 4) - 32)


def q8_0(block, k):
    return half(block, 0) * F32(signed(block[2 + k]))


KVALUES_IQ4NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def iq4_nl(block, k):
    return half(block, 0) * F32(KVALUES_IQ4NL[nibble(block, 2, k)])


def iq4_xs(block, k):
    j = k // 32
    low = block[4 + j // 2] >> 4 * (j % 2) & 15
    high = int.from_bytes(block[2:4], "little") >> 2 * j & 3
    scale = (low | high << 4) - 32
    return half(block, 0) * F32(scale) * F32(KVALUES_IQ4NL[nibble(block, 8 + 16 * j, k % 32)])


def tq1_0(block, k):
    if k < 160:
        byte, digit = block[k % 32], k // 32
    elif k < 240:
        byte, digit = block[32 + k % 16], (k - 160) // 16
    else:
        byte, digit = block[48 + k % 4], (k - 240) // 4
    return F32((byte * 3**digit % 256 * 3 >> 8) - 1) * half(block, 52)


def tq2_0(block, k):
    return F32(crumb(block, 0, k) - 1) * half(block, 64)


def e2m1(code):
    """A float of 4 bits, by its sign, exponent and mantissa; ggml has no -0."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if code & 8 and size else size


def ue4m3(byte):
    """A float of 7 bits without a sign; ggml takes NaN for 0, and does not look at the eighth bit of others."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte == 0x7F:
        return 0.0
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9


def mxfp4(block, k):
    # Products of float32: the largest scales make infinities of the largest codes.
    with np.errstate(over="ignore"):
        return F32(2 * e2m1(nibble(block, 1, k))) * F32(2.0 ** (block[0] - 128))


def nvfp4(block, k):
    code = block[4 + 8 * (k // 16) + k % 8] >> 4 * (k % 16 // 8) & 15
    return F32(e2m1(code) * ue4m3(block[k // 16]))


# By type: weights of a block, its bytes, where it has float16, its definition; then bits and group size when packed.
TYPES = {
    "Q1_0": (128, 18, [0], q1_0, 4, 128),
    "Q2_K": (256, 84, [80, 82], q2_k, 4, 16),
    "Q3_K": (256, 110, [108], q3_k, 4, 16),
    "Q4_0": (32, 18, [0], q4_0, 4, 32),
    "Q4_1": (32, 20, [0, 2], q4_1, 4, 32),
    "Q4_K": (256, 144, [0, 2], q4_k, 4, 32),
    "Q5_0": (32, 22, [0], q5_0, 5, 32),
    "Q5_1": (32, 24, [0, 2], q5_1, 5, 32),
    "Q5_K": (256, 176, [0, 2], q5_k, 5, 32),
    "Q6_K": (256, 210, [208], q6_k, 6, 16),
    "Q8_0": (32, 34, [0], q8_0, 8, 32),
    "IQ4_NL": (32, 18, [0], iq4_nl, 4, 32),
    "IQ4_XS": (256, 136, [0], iq4_xs, 4, 32),
    "TQ1_0": (256, 54, [52], tq1_0, 4, 256),
    "TQ2_0": (256, 66, [64], tq2_0, 4, 256),
    "MXFP4": (32, 17, [], mxfp4, 4, 32),
    "NVFP4": (64, 36, [], nvfp4, 4, 16),
}


def weights(data, kind):
    """Row by row, block by block, weight by weight."""
    count, size, _, weight, *_ = TYPES[kind]
    rows = []
    for row in data:
        blocks = [bytes(row[at : at + size]) for at in range(0, len(row), size)]
        rows.append([weight(block, k) for block in blocks for k in range(count)])
    return np.array(rows, F32)


# ---- the importer -------------------------------------------------------------------------------

# The largest and smallest of either sign, subnormal ones, zeros, and some others.
HALVES = np.array([65504, -65504, 2.0**-24, -(2.0**-24), 0.0, -0.0, 1023 * 2.0**-24, 2.0**-14, 1, -0.3, 1e-3], "<f2")


def random_blocks(kind, n=3, k=768, seed=0, halves=HALVES):
    """Rows of any bytes, but for scales that are finite."""
    rng = np.random.default_rng(seed)
    count, size, places, *_ = TYPES[kind]
    data = rng.integers(0, 256, (n, k // count, size), np.uint8)
    for at in places:
        data[:, :, at : at + 2] = rng.choice(halves, (n, k // count, 1)).view(np.uint8)
    if kind == "MXFP4":
        data[:, :, 0] = rng.integers(0, 255, data.shape[:2])
    return data.reshape(n, -1)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_exact(kind, seed):
    data = random_blocks(kind, seed=seed)
    weight = gguf.unpack(data, kind)
    assert weight.shape == (3, 768)
    packed = weight.pack()
    assert (packed.bits, packed.group_size) == TYPES[kind][4:]
    assert_same_bits(packed.dequantize(), weights(data, kind))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "Q1_0"])
def test_weights_are_those_of_the_package_gguf(kind):
    ggml = reader("gguf")
    data = random_blocks(kind, 40, 1536, seed=1)
    with np.errstate(over="ignore"):  # as the definition has it
        expected = ggml.dequantize(data, ggml.GGMLQuantizationType[kind])
    assert_same_bits(gguf.unpack(data, kind).pack().dequantize(), expected)


def test_every_type_is_tested():
    assert gguf.TYPES.keys() == TYPES.keys()
    names = re.findall('"([A-Z0-9_]+)"', gguf.unpack.__doc__)
    assert sorted(names) == sorted(TYPES)


def mild_blocks(kind, n, k):
    """With scales of one size, so that no weight hides another."""
    data = random_blocks(kind, n, k, halves=np.array([0.011], "<f2"))
    blocks = data.reshape(n, -1, TYPES[kind][1])
    if kind == "MXFP4":
        blocks[:, :, 0] = 120
    elif kind == "NVFP4":
        blocks[:, :, :4] = 60
    return data


@pytest.mark.parametrize("kind", TYPES)
def test_products(kernel, kind):
    n, k = 80, 768
    x = np.random.default_rng(1).standard_normal((3, k), np.float32)
    packed = gguf.unpack(mild_blocks(kind, n, k), kind).pack()
    w = packed.dequantize().astype(np.float64)
    y = linear(x, packed, act="int16")
    np.testing.assert_allclose(y, x @ w.T, rtol=0, atol=1e-3 * np.abs(w).max() * np.abs(x).sum(axis=1).max() / k**0.5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n, blocks", [(1, 1), (33, 3), (64, 4)])
def test_the_packed_size_is_known_before_the_weights_are_read(kind, n, blocks):
    k = blocks * TYPES[kind][0]
    layer = Layer(kind, (n, k), 0, (), format=gguf.format_of(kind, n, k))
    packed = gguf.unpack(mild_blocks(kind, n, k), kind).pack()
    assert packed.nbytes == layer.packed_nbytes
    if kind != "MXFP4":  # whose scales float16 or bfloat16 can hold
        assert packed._format == layer.format


BITS_PER_WEIGHT = {
    "Q2_K": 5.15, "Q3_K": 4.65, "Q4_0": 4.5, "Q4_1": 5, "Q4_K": 4.65, "Q5_0": 5.5, "Q5_K": 5.7, "Q6_K": 6.7,
    "Q8_0": 8.5, "IQ4_XS": 4.35, "MXFP4": 4.51, "NVFP4": 5.01,
}  # fmt: skip


@pytest.mark.parametrize("kind", BITS_PER_WEIGHT)
def test_weights_keep_their_size(kind):
    packed = gguf.unpack(random_blocks(kind, 64, 1024), kind).pack()
    assert 8 * (packed.nbytes - 4 * 64) / (64 * 1024) <= BITS_PER_WEIGHT[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_rows_and_memory_of_any_kind(kind):
    data = random_blocks(kind, 6)
    expected = gguf.unpack(data, kind).pack().dequantize()
    assert_same_bits(gguf.unpack(data[::-2], kind).pack().dequantize(), expected[::-2])
    assert_same_bits(gguf.unpack(np.asfortranarray(data), kind).pack().dequantize(), expected)
    odd = np.empty(data.size + 1, np.uint8)[1:].reshape(data.shape)
    odd[...] = data
    odd.flags.writeable = False
    assert_same_bits(gguf.unpack(odd, kind).pack().dequantize(), expected)
    assert_same_bits(gguf.unpack(data, kind).rows(slice(1, 4)).pack().dequantize(), expected[1:4])


# ---- traps ----------------------------------------------------------------------------------------


def test_mxfp4_halves_not_pairs():
    """In other files of MXFP4, such as those of gpt-oss, a byte has two neighbours."""
    block = np.zeros((1, 17), np.uint8)
    block[0, 0] = 128
    block[0, 1] = 0x21
    found = gguf.unpack(block, "MXFP4").pack().dequantize()[0]
    assert np.flatnonzero(found).tolist() == [0, 16]
    assert found[[0, 16]].tolist() == [1, 2]


def test_nvfp4_scales():
    """Of all bytes: NaN is 0, and the highest bit counts only in that 0xFF is none."""
    data = np.zeros((64, 36), np.uint8)
    data[:, :4] = np.arange(256).reshape(64, 4)
    data[:, 4:] = 0x22  # 1
    found = gguf.unpack(data, "NVFP4").pack().dequantize()[:, ::16].ravel()
    assert_same_bits(found, np.array([ue4m3(byte) for byte in range(256)], F32))
    assert found[[0x7E, 0x7F, 0x80, 0xFF]].tolist() == [448, 0, 0, 480]


def test_mxfp4_scales():
    """Those of float32 and less: the smallest are subnormal."""
    data = np.zeros((255, 17), np.uint8)
    data[:, 0] = np.arange(255)
    data[:, 1:] = 0x21  # 0.5 and 1
    found = gguf.unpack(data, "MXFP4").pack().dequantize()[:, [0, 16]]
    expected = [[2.0 ** (e - 128), 2.0 ** (e - 127)] for e in range(255)]
    assert_same_bits(found, np.array(expected, F32))


def test_tq1_0_digits_of_every_byte():
    """Also of those that no quantizer writes: there are 243 combinations of 5 digits."""
    data = np.zeros((256, 54), np.uint8)
    data[:, :52] = np.arange(256)[:, None]
    data[:, 52:] = np.array([1], "<f2").view(np.uint8)
    assert_same_bits(gguf.unpack(data, "TQ1_0").pack().dequantize(), weights(data, "TQ1_0"))


def test_q4_k_scales_of_the_last_groups():
    """Of the last 4 of 8 groups, the 2 high bits are with the first 4."""
    block = np.zeros((1, 144), np.uint8)
    block[0, :4] = np.array([1, 1], "<f2").view(np.uint8)
    block[0, 4 + 1] = 0x80  # 32 of scale 5
    block[0, 8 + 2] = 0x40  # 16 of minimum 6
    block[0, 12 + 1] = 0x05  # and 5 of scale 5
    block[0, 12 + 2] = 0x70  # and 7 of minimum 6
    block[0, 16:] = 0x11
    found = gguf.unpack(block, "Q4_K").pack().dequantize().reshape(8, 32)
    assert (found.T == [0, 0, 0, 0, 0, 37, -23, 0]).all()


def test_q3_k_bits_that_are_set_subtract_nothing():
    block = np.zeros((1, 110), np.uint8)
    block[0, 108:] = np.array([1], "<f2").view(np.uint8)
    block[0, 96:104] = 0x11
    block[0, 104:108] = 0xAA  # scales of 33 - 32
    block[0, 7] = 0x81  # of weights 7 and 7 * 32 + 7
    found = gguf.unpack(block, "Q3_K").pack().dequantize()[0]
    assert np.flatnonzero(found == 0).tolist() == [7, 231]
    assert (np.delete(found, [7, 231]) == -4).all()


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, kind, error, message",
    [
        (np.zeros((2, 18), np.uint8), 4, TypeError, "type must be a str, got int"),
        (np.zeros((2, 18), np.uint8), None, TypeError, "type must be a str, got NoneType"),
        (np.zeros((2, 18), np.uint8), "Q8_1", ValueError, "type must be Q1_0, .* or NVFP4, got 'Q8_1'"),
        (np.zeros((2, 18), np.uint8), "q4_0", ValueError, "type must be Q1_0, .*, got 'q4_0'"),
        (np.zeros((2, 18), np.int8), "Q4_0", TypeError, "data must be an array of uint8, got int8"),
        (np.zeros((2, 18)), "Q4_0", TypeError, "data must be an array of uint8, got float64"),
        (b"18 bytes of a block", "Q4_0", TypeError, "data must be an array of uint8, got .*"),
        (np.zeros(18, np.uint8), "Q4_0", ValueError, r"data of Q4_0 must be .* blocks of 18 bytes, got \(18,\)"),
        (np.zeros((1, 2, 18), np.uint8), "Q4_0", ValueError, r"matrix .* got \(1, 2, 18\)"),
        (np.zeros((2, 19), np.uint8), "Q4_0", ValueError, r"whole blocks of 18 bytes, got \(2, 19\)"),
        (np.zeros((0, 18), np.uint8), "Q4_0", ValueError, r"got \(0, 18\)"),
        (np.zeros((2, 0), np.uint8), "Q4_0", ValueError, r"got \(2, 0\)"),
    ],
)
def test_arguments_that_are_refused(data, kind, error, message):
    with pytest.raises(error, match=message):
        gguf.unpack(data, kind)


# Quiet and signalling NaN, infinities.
@pytest.mark.parametrize("value", [0x7E00, 0x7D01, 0xFFFF, 0x7C00, 0xFC00], ids=hex)
@pytest.mark.parametrize("kind, at", [(kind, at) for kind in TYPES for at in TYPES[kind][2]])
def test_scales_that_are_not_finite(kind, at, value):
    data = mild_blocks(kind, 3, 512)
    data.reshape(3, -1, TYPES[kind][1])[2, -1, at : at + 2] = np.array([value], "<u2").view(np.uint8)
    with pytest.raises(ValueError, match=r"(scales|offsets) must be finite"):
        gguf.unpack(data, kind).pack()


def test_a_scale_that_mxfp4_has_for_nan():
    data = random_blocks("MXFP4")
    data[2, 17] = 255
    with pytest.raises(ValueError, match="scales must be finite, got the exponent 255"):
        gguf.unpack(data, "MXFP4")
