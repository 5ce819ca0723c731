"""What must not change a bit: the other rows, their order, the threads, the kernel, the fused call."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    Weight,
    assert_same_bits,
    bias_of,
    floats,
    pack,
    quantized,
)

import pyda8w4

WEIGHT = Weight(97, 1100, 100)
ROWS = 250


def test_a_row_does_not_depend_on_the_batch(kernel):
    x = floats(WEIGHT.k, rows=ROWS)
    together = pyda8w4.linear(x, pack(WEIGHT))
    for row in (0, 1, 4, 5, 7, 8, 9, 100, 238, 239, 240, 249):
        assert_same_bits(pyda8w4.linear(x[row], pack(WEIGHT)), together[row], row)
    for begin, end in ((0, 5), (3, 12), (7, 70), (200, 250), (1, 242)):
        assert_same_bits(pyda8w4.linear(x[begin:end], pack(WEIGHT)), together[begin:end], (begin, end))


def test_the_order_of_rows_does_not_matter(kernel):
    a, a_scales, a_zps = quantized(WEIGHT.k, "uint8", ROWS)
    order = np.random.default_rng(1).permutation(ROWS)
    y = pyda8w4.gemm(a, pack(WEIGHT), a_scales, a_zps)
    assert_same_bits(pyda8w4.gemm(a[order], pack(WEIGHT), a_scales[order], a_zps[order]), y[order])


@pytest.mark.pitfall("general", "thread count changes bits")
@pytest.mark.parametrize("rows", [1, 4, 7, 70, ROWS])
def test_thread_count_invariance(kernel, threads, rows):
    x = floats(WEIGHT.k, rows=ROWS)[:rows]
    weights = [pack(WEIGHT), pack(Weight(1, 4100)), pack(Weight(1000, 64, 32))]
    pyda8w4.set_num_threads(1)
    expected = [pyda8w4.linear(np.resize(x, (rows, w.shape[1])), w) for w in weights]
    quantized_alone = pyda8w4.quantize_activation(x)
    for count in (2, 3, 4, 7, 16):
        pyda8w4.set_num_threads(count)
        for weight, y in zip(weights, expected, strict=True):
            assert_same_bits(pyda8w4.linear(np.resize(x, (rows, weight.shape[1])), weight), y, count)
        for got, wanted in zip(pyda8w4.quantize_activation(x), quantized_alone, strict=True):
            assert_same_bits(got, wanted, count)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("act", ["uint8", "int8"])
def test_linear_is_quantize_activation_then_gemm(kernel, dtype, act):
    for weight in (WEIGHT, Weight(33, 67, 32), Weight(5, 3)):
        x = floats(weight.k, dtype)
        for rows in (1, 6, 70):
            a, a_scales, a_zps = pyda8w4.quantize_activation(x[:rows], act)
            apart = pyda8w4.gemm(a, pack(weight), a_scales, a_zps, bias=bias_of(weight.n), out_dtype=DTYPES[dtype])
            fused = pyda8w4.linear(x[:rows], pack(weight), bias_of(weight.n), act=act)
            assert_same_bits(fused, apart, (weight, rows))


def test_a_narrow_float_row_is_its_float32_row(kernel):
    for dtype in ("float16", "bfloat16"):
        x = floats(WEIGHT.k, dtype)[:9]
        y = pyda8w4.linear(x, pack(WEIGHT), out_dtype=np.float32)
        assert_same_bits(y, pyda8w4.linear(x.astype(np.float32), pack(WEIGHT)))


@pytest.mark.parametrize("rows", [1, 5, 64, 300])
@pytest.mark.parametrize("group", [32, 128, None])
def test_all_kernels_agree_on_a_large_product(rows, group):
    weight = Weight(513, 2051, group, scales="float16")
    x = floats(weight.k, rows=300)[:rows]
    results = {}
    for name in pyda8w4.kernels():
        with pyda8w4.use_kernel(name):
            results[name] = pyda8w4.linear(x, pack(weight), bias_of(weight.n))
    expected = results.pop("scalar")
    for name, y in results.items():
        assert_same_bits(y, expected, name)


def test_a_call_leaves_nothing_behind_for_the_next(kernel):
    # A workspace is reused: large after small after large, direct after panel.
    first = {}
    for _ in range(2):
        for weight, rows in ((WEIGHT, ROWS), (Weight(1, 3), 1), (Weight(33, 67, 32), 20), (WEIGHT, 2)):
            y = pyda8w4.linear(floats(weight.k, rows=ROWS)[:rows], pack(weight))
            assert_same_bits(y, first.setdefault((weight, rows), y), (weight, rows))
