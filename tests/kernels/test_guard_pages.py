"""No kernel reads or writes a byte beside its operands."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    KINDS,
    Weight,
    assert_gemm_exact,
    assert_same_bits,
    assert_same_weight,
    bias_of,
    floats,
    given,
    pack,
    quantized,
    stored_arrays,
    with_stored,
)
from guard import guarded

import pyda8w4

F32 = np.float32


@pytest.mark.pitfall("general", "out-of-bounds read past A, B, zero points, bias")
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    "weight",
    [
        Weight(1, 1),
        Weight(3, 5, 4, "float16"),
        Weight(31, 63, 32, zps=8),
        Weight(32, 64, 64, "bfloat16"),
        Weight(33, 67, 32, "float16"),
        Weight(65, 513, 256, zps="extreme"),
        Weight(47, 600),
        Weight(16, 131, 128),
        Weight(33, 67, 32, "float16", offsets=True),
        Weight(3, 600, offsets=True),
        Weight(31, 64, 32, "bfloat16", 0, offsets=True),
        *KINDS,
    ],
    ids=str,
)
def test_pages_beside_the_operands_are_not_touched(kernel, side, weight):
    """The pages beside the operands kill the process."""
    packed = pack(weight)
    parts = {name: guarded(array, side) for name, array in stored_arrays(packed).items()}
    guarded_weight = with_stored(packed, **parts)
    bias = guarded(bias_of(weight.n), side)
    for rows in (1, 2, 5, 6, 8, 9, 13):
        for act in () if weight.factors or weight.rotation else ("uint8", "int8"):
            a, a_scales, a_zps = (guarded(array[:rows], side) for array in quantized(weight.k, act))
            for out, dtype in DTYPES.items():
                y = guarded(np.zeros((rows, weight.n), dtype), side)
                pyda8w4.gemm(a, guarded_weight, a_scales, a_zps, bias=bias, out=y)
                if (rows, act) == (9, "uint8"):
                    assert_gemm_exact(weight, rows, act, bias=True, out=out)
                    assert_same_bits(y, pyda8w4.gemm(a, packed, a_scales, a_zps, bias=bias, out_dtype=dtype))
        for dtype in DTYPES:
            x = guarded(floats(weight.k, dtype)[:rows], side)
            y = guarded(np.zeros((rows, weight.n), F32), side)
            for act in ("uint8", "int8_group", "int16"):
                pyda8w4.linear(x, guarded_weight, act=act, out=y)
                assert_same_bits(y, pyda8w4.linear(x, packed, act=act, out_dtype=F32))
            pyda8w4.quantize_activation(x)
            pyda8w4.quantize_activation(x, act="int8")
    arguments = {name: guarded(array, side) for name, array in given(weight).items()}
    assert_same_weight(pyda8w4.prepack(**arguments, **weight.options), packed)
    assert guarded_weight.unpack()[0].shape == packed.shape
    assert_same_bits(guarded_weight.dequantize([0, -1, 0]), packed.dequantize([0, -1, 0]))
    if weight.k % 2 == 0 and weight.bits == 4:
        codes = arguments["codes"]
        arguments["codes"] = guarded(codes[:, ::2] | codes[:, 1::2] << 4, side)
        assert_same_weight(pyda8w4.prepack(**arguments, **weight.options, nibbles="low_first"), packed)


def test_nothing_is_written_beside_out(kernel):
    """Nothing is written beside `out`, even inside its page."""
    for n in (1, 31, 33, 47):
        for dtype in DTYPES.values():
            memory = np.full(2000 + 9 * n, 77, dtype)
            out = memory[1000 : 1000 + 9 * n].reshape(9, n)
            pyda8w4.linear(floats(40)[:9], pack(Weight(n, 40, 20)), out=out)
            assert (memory[:1000] == 77).all() and (memory[1000 + 9 * n :] == 77).all()
