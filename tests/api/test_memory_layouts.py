"""Arrays in any memory: strided, misaligned, read-only, broadcast; none is changed, and `out` overlaps none."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    Weight,
    arrays,
    assert_same_bits,
    assert_same_weight,
    bias_of,
    floats,
    pack,
    quantized,
    with_stored,
)

import pyda8w4

F32 = np.float32


def operands(weight, rows=9):
    a, a_scales, a_zps = (array[:rows] for array in quantized(weight.k, "uint8"))
    return {"a": a, "a_scales": a_scales, "a_zps": a_zps, "bias": bias_of(weight.n)}


def check_variants(variant):
    """Both products give the same bits when every operand is replaced by variant(operand)."""
    weight = Weight(33, 67, 32, zps="extreme")
    expected = pyda8w4.gemm(packed=pack(weight), **operands(weight))
    changed = {name: variant(array) for name, array in operands(weight).items()}
    for name, array in changed.items():
        np.testing.assert_array_equal(array, operands(weight)[name])
    assert_same_bits(pyda8w4.gemm(packed=pack(weight), **changed), expected)

    codes, scales, zps = (variant(array) for array in arrays(weight))
    packed = pyda8w4.prepack(codes, scales, zps, group_size=32)
    assert_same_weight(packed, pack(weight))

    for dtype in DTYPES:
        x = floats(67, dtype)[:9]
        assert_same_bits(pyda8w4.linear(variant(x), packed), pyda8w4.linear(x, packed))
        for got, wanted in zip(pyda8w4.quantize_activation(variant(x)), pyda8w4.quantize_activation(x), strict=True):
            assert_same_bits(got, wanted)
        w = floats(67, dtype)[:9]
        for got, wanted in zip(pyda8w4.quantize_weight(variant(w), 32), pyda8w4.quantize_weight(w, 32), strict=True):
            assert_same_bits(got, wanted)


def every_other(array):
    wide = np.full(tuple(2 * size for size in array.shape), 1, array.dtype)
    part = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    part[...] = array
    return part


def reversed_memory(array):
    every = tuple(slice(None, None, -1) for _ in array.shape)
    return np.ascontiguousarray(array[every])[every]


def rows_apart(array):
    wide = np.ones((*array.shape[:-1], array.shape[-1] + 5), array.dtype)
    wide[..., :-5] = array
    return wide[..., :-5]


@pytest.mark.pitfall("general", "non-contiguous input read as contiguous")
@pytest.mark.parametrize("variant", [every_other, reversed_memory, rows_apart, np.asfortranarray])
def test_arrays_that_are_not_contiguous(kernel, variant):
    check_variants(variant)


@pytest.mark.pitfall("general", "misaligned input")
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_arrays(kernel, offset):
    def shift(array):
        memory = bytes(offset) + array.tobytes()
        return np.frombuffer(memory, np.uint8)[offset:].view(array.dtype).reshape(array.shape)

    check_variants(shift)
    weight = Weight(33, 67, 32, zps="extreme")
    expected = pyda8w4.gemm(packed=pack(weight), **operands(weight))
    out = np.frombuffer(bytearray(offset + expected.nbytes), np.uint8)[offset:].view(F32).reshape(expected.shape)
    with pytest.raises(ValueError, match="out must be aligned to its 4 bytes"):
        pyda8w4.gemm(packed=pack(weight), **operands(weight), out=out)


@pytest.mark.pitfall("general", "read-only input refused")
def test_read_only_arrays(kernel):
    def locked(array):
        array = array.copy()
        array.flags.writeable = False
        return array

    check_variants(locked)
    check_variants(lambda array: np.frombuffer(array.tobytes(), np.uint8).view(array.dtype).reshape(array.shape))


@pytest.mark.pitfall("general", "stride 0 of broadcast arrays")
def test_broadcast_arrays(kernel):
    packed = pack(Weight(33, 67, 32))
    row = floats(67)[:1]
    assert_same_bits(
        pyda8w4.linear(np.broadcast_to(row, (9, 67)), packed), np.tile(pyda8w4.linear(row, packed), (9, 1))
    )
    same = np.broadcast_to(F32(0.5), (9, 67))
    assert_same_bits(pyda8w4.linear(same, packed), pyda8w4.linear(same.copy(), packed))
    a = quantized(67, "int8")[0][:9]
    half, one, zero = np.broadcast_to(F32(0.5), 9), np.broadcast_to(np.int32(1), 9), np.broadcast_to(F32(0), 33)
    assert_same_bits(
        pyda8w4.gemm(a, packed, half, one, bias=zero),
        pyda8w4.gemm(a, packed, half.copy(), one.copy(), bias=zero.copy()),
    )
    codes = np.broadcast_to(np.arange(64, dtype=np.uint8) % 16, (33, 64))
    scales, zps = np.broadcast_to(F32(0.3), (33, 2)), np.broadcast_to(np.int8(3), (33, 2))
    assert_same_weight(pyda8w4.prepack(codes, scales, zps), pyda8w4.prepack(codes.copy(), scales.copy(), zps.copy()))


def test_a_single_row_of_any_stride(kernel):
    # numpy gives a dimension of length 1 any stride and still calls the array contiguous.
    codes = np.arange(8, dtype=np.uint8)
    scale = np.ones(1, F32)
    expected = pyda8w4.prepack(codes[None].copy(), scale)
    for stride in (0, 1, 8, 1000, -8):
        one = np.lib.stride_tricks.as_strided(codes, (1, 8), (stride, 1))
        assert_same_weight(pyda8w4.prepack(one, scale), expected)
        assert_same_weight(pyda8w4.prepack(np.broadcast_to(codes, (1, 8)), np.broadcast_to(scale, (1, 1))), expected)
    x = np.arange(8, dtype=F32)
    for stride in (0, 4, 1000, -32):
        one = np.lib.stride_tricks.as_strided(x, (1, 8), (stride, 4))
        assert_same_bits(pyda8w4.linear(one, expected), pyda8w4.linear(x, expected)[None])
        out = np.full(1, 7, F32)
        pyda8w4.linear(one, expected, out=np.lib.stride_tricks.as_strided(out, (1, 1), (stride, stride)))
        assert_same_bits(out, pyda8w4.linear(x, expected))


def test_inputs_are_not_changed():
    # test_prepack.py has the inputs of prepack.
    a, a_scales, a_zps = (array[:9].copy() for array in quantized(64, "uint8"))
    pyda8w4.gemm(a, pack(Weight(33, 64)), a_scales, a_zps, bias=bias_of(33))
    for array, was in zip((a, a_scales, a_zps), quantized(64, "uint8"), strict=True):
        assert_same_bits(array, was[:9])
    x = floats(64)[:9].copy()
    pyda8w4.linear(x, pack(Weight(33, 64)))
    assert_same_bits(x, floats(64)[:9])


@pytest.mark.pitfall("general", "out aliases an input")
def test_out_that_overlaps_an_input_is_refused(kernel):
    k = n = 32
    packed = pack(Weight(n, k, 16))
    memory = floats(k)[:9].copy()
    before = memory.copy()
    for x, out in ((memory, memory), (memory[1:], memory[:-1]), (memory[:5], memory[4:])):
        with pytest.raises(ValueError, match="out must not overlap"):
            pyda8w4.linear(x, packed, out=out)
    a, a_scales, a_zps = (array[:9].copy() for array in quantized(k, "uint8"))
    # An activation, 9 scales or 9 zero points that lie inside out.
    for name, array in {"a": a, "a_scales": a_scales, "a_zps": a_zps}.items():
        out = np.zeros((9, n), F32)
        inside = out.reshape(-1).view(array.dtype)[: array.size].reshape(array.shape)
        with pytest.raises(ValueError, match="out must not overlap"):
            pyda8w4.gemm(packed=packed, **{"a": a, "a_scales": a_scales, "a_zps": a_zps, name: inside}, out=out)
    bias = np.zeros(n, F32)
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.linear(before[:1], packed, bias, out=bias[None])
    assert_same_bits(memory, before)
    # Neighbours are no overlap.
    pyda8w4.linear(memory[:4], packed, out=memory[4:8])
    assert_same_bits(memory[4:8], pyda8w4.linear(before[:4], packed))


def test_out_that_overlaps_the_weight_is_refused():
    memory = np.zeros(64, F32)
    packed = with_stored(pack(Weight(32, 16, 16)), sums=memory[:32].reshape(1, 32))
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.linear(np.zeros((1, 16), F32), packed, out=memory[None, :32])
    pyda8w4.linear(np.zeros((1, 16), F32), packed, out=memory[None, 32:])
