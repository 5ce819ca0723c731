"""Every kernel gives the bits of the numpy oracle."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    MOST_ROWS,
    Weight,
    arrays,
    assert_gemm_exact,
    assert_same_bits,
    assert_same_weight,
    bias_of,
    expected_gemm,
    expected_linear,
    floats,
    pack,
    quantized,
    stored_arrays,
    with_stored,
)

import pyda8w4

F32 = np.float32
FLOATS = tuple(DTYPES)
ACTIVATIONS = ("uint8", "int8")
# A few rows read packed codes directly; more share a panel. 3 and 13 leave a short last tile in both.
FEW, MANY = 3, 13

offsets_or_none = pytest.mark.parametrize("offsets", [False, True], ids=["no-offsets", "offsets"])


@offsets_or_none
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 63, 64, 65, 67, 127, 128, 129, 130, 255, 257])
def test_k_tails(kernel, k, offsets):
    for n in (1, 33):
        for group in {k, 4 if k > 4 else k, 32 if k > 32 else k}:
            for act in ACTIVATIONS:
                for rows in (FEW, MANY):
                    assert_gemm_exact(Weight(n, k, group, offsets=offsets), rows, act)


@offsets_or_none
@pytest.mark.parametrize("n", [1, 2, 8, 15, 16, 17, 24, 31, 32, 33, 48, 49, 63, 64, 65, 97])
@pytest.mark.parametrize("out", FLOATS)
def test_n_tails(kernel, n, out, offsets):
    for rows in (FEW, MANY):
        assert_gemm_exact(Weight(n, 70, 20, offsets=offsets), rows, bias=True, out=out)
        assert_gemm_exact(Weight(n, 70, 20, offsets=offsets), rows, bias=False, out=out)


@offsets_or_none
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_small_number_of_rows(kernel, act, offsets):
    for rows in range(71):
        assert_gemm_exact(Weight(65, 260, 64, offsets=offsets), rows, act, bias=True)


@offsets_or_none
@pytest.mark.parametrize("rows", [239, 240, 241, 245, 250, 480, 487])
def test_row_block_edges(kernel, rows, offsets):
    assert_gemm_exact(Weight(33, 68, 32, offsets=offsets), rows, most=487)
    assert_gemm_exact(Weight(33, 68, 32, offsets=offsets), rows, "int8", bias=True, most=487)


# Chunks of 256 and panels of 512 k are borders inside the driver; groups may straddle or divide them.
@offsets_or_none
@pytest.mark.parametrize("group", [4, 32, 36, 64, 100, 128, 252, 256, 260, 508, 512, 516, 600, 768, 1000, 1028])
def test_groups(kernel, group, offsets):
    for k in {group, 2 * group, 2 * group + 4, 3 * group - 1, max(1300, group + 1)}:
        for rows in (1, FEW, MANY):
            assert_gemm_exact(Weight(34, k, group, offsets=offsets), rows)
        assert_gemm_exact(Weight(34, k, group, offsets=offsets), MANY, "int8")


# Groups of whole steps that divide k, as most weights have them: tiles of every height, packed and unpacked.
@offsets_or_none
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_whole_groups(kernel, group, offsets):
    for act in ACTIVATIONS:
        for rows in (*range(1, 14), *range(25, 32), MOST_ROWS):
            assert_gemm_exact(Weight(47, 768, group, offsets=offsets), rows, act)


@offsets_or_none
@pytest.mark.parametrize("k", [255, 256, 257, 511, 512, 513, 770, 1025, 2049])
def test_per_channel_across_chunks_and_panels(kernel, k, offsets):
    for zps in ("extreme", 8, -128, 127):
        for rows in (2, MANY):
            assert_gemm_exact(Weight(33, k, zps=zps, offsets=offsets), rows)


@offsets_or_none
@pytest.mark.parametrize("zps", ["extreme", "random", -128, -1, 0, 7, 8, 15, 16, 127])
@pytest.mark.parametrize("group", [16, 512, None])
def test_zero_points(kernel, zps, group, offsets):
    for act in ACTIVATIONS:
        for rows in (FEW, MANY):
            assert_gemm_exact(Weight(40, 600, group, zps=zps, offsets=offsets), rows, act)


@offsets_or_none
@pytest.mark.parametrize("scales", FLOATS)
def test_scale_storage(kernel, scales, offsets):
    for group in (36, 300, None):
        weight = Weight(47, 600, group, scales=scales, offsets=offsets)
        assert pack(weight).scale_dtype == scales
        for rows in (FEW, MANY):
            assert_gemm_exact(weight, rows)


@offsets_or_none
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_threads(kernel, threads, count, offsets):
    pyda8w4.set_num_threads(count)
    # Rows prepared by each thread for itself; blocks split; rows split because blocks are too few.
    assert_gemm_exact(Weight(330, 600, 100, offsets=offsets), 4)
    assert_gemm_exact(Weight(330, 600, 100, offsets=offsets), 7)
    assert_gemm_exact(Weight(97, 600, 100, offsets=offsets), MANY)
    assert_gemm_exact(Weight(33, 300, 100, offsets=offsets), 70, bias=True)
    assert_gemm_exact(Weight(1, 4100, 512, offsets=offsets), (0, 250), most=250)


@offsets_or_none
@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("act", ["uint8", "int8", "int8_group", "int16"])
def test_linear(kernel, x, act, offsets):
    for weight in (
        Weight(33, 130, 32, offsets=offsets),
        Weight(65, 259, 100, offsets=offsets),
        Weight(7, 515, offsets=offsets),
    ):
        for out in FLOATS:
            expected = expected_linear(weight, x, act=act, bias=True, out=out)
            for rows in (1, 4, 5, 8, 9, 70):
                given = floats(weight.k, x)[:rows]
                y = pyda8w4.linear(given, pack(weight), bias_of(weight.n), act=act, out_dtype=DTYPES[out])
                assert_same_bits(y, expected[:rows], (weight, rows, out))


def test_linear_without_bias_gives_the_dtype_of_x(kernel):
    weight = Weight(33, 130, 32)
    for x, dtype in DTYPES.items():
        y = pyda8w4.linear(floats(130, x)[:9], pack(weight))
        assert y.dtype == dtype
        assert_same_bits(y, expected_linear(weight, x, out=x)[:9])


@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4), (2, 1, 6), (1, 1, 1, 2), (0,), (2, 0), (0, 3)])
def test_leading_dimensions(kernel, shape):
    weight = Weight(33, 68, 32)
    m = int(np.prod(shape))
    a, a_scales, a_zps = (array[:m] for array in quantized(68, "uint8"))
    y = pyda8w4.gemm(a.reshape(*shape, 68), pack(weight), a_scales.reshape(shape), a_zps.reshape(shape))
    assert y.shape == (*shape, 33)
    assert_same_bits(y.reshape(m, 33), expected_gemm(weight)[:m])

    y = pyda8w4.linear(floats(68)[:m].reshape(*shape, 68), pack(weight))
    assert y.shape == (*shape, 33)
    assert_same_bits(y.reshape(m, 33), expected_linear(weight)[:m])


def test_scales_default_to_1_and_zero_points_to_0(kernel):
    weight = Weight(33, 68, 32)
    for act in ACTIVATIONS:
        a = quantized(68, act)[0][:9]
        ones, zeros = np.ones(9, np.float32), np.zeros(9, np.int32)
        y = pyda8w4.gemm(a, pack(weight))
        assert_same_bits(y, pyda8w4.gemm(a, pack(weight), ones, zeros))
        assert_same_bits(y, pyda8w4.gemm(a, pack(weight), ones))
        assert_same_bits(y, pyda8w4.gemm(a, pack(weight), None, zeros))


def test_out_is_filled_and_returned(kernel):
    weight = Weight(33, 68, 32)
    for name, dtype in DTYPES.items():
        out = np.full((9, 33), 7, dtype)
        a, a_scales, a_zps = (array[:9] for array in quantized(68, "uint8"))
        assert pyda8w4.gemm(a, pack(weight), a_scales, a_zps, out=out) is out
        assert_same_bits(out, expected_gemm(weight, out=name)[:9])


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes(kernel, threads, seed):
    rng = np.random.default_rng(seed)
    pyda8w4.set_num_threads(int(rng.integers(1, 4)))
    n, k = (int(size) for size in rng.integers(1, (200, 1500)))
    weight = Weight(
        n,
        k,
        rng.choice([None, 4 * int(rng.integers(1, 1 + -(-k // 4)))]),
        rng.choice(FLOATS),
        rng.choice(np.array(["random", "extreme", 8, 0], object)),
        bool(rng.integers(2)),
    )
    assert_gemm_exact(
        weight, int(rng.integers(1, 71)), rng.choice(ACTIVATIONS), bias=bool(rng.integers(2)), out=rng.choice(FLOATS)
    )


# ---- shapes that other libraries got wrong -----------------------------------------------------


@pytest.mark.pitfall("torchao, sglang, vLLM", "M = 0, block_m = M, division by zero")
def test_no_rows(kernel):
    for shape in ((0, 64), (0, 3, 64), (3, 0, 64)):
        y = pyda8w4.linear(np.empty(shape, F32), pack(Weight(33, 64, 32)), bias_of(33))
        assert y.shape == (*shape[:-1], 33) and y.dtype == F32
        assert pyda8w4.gemm(np.empty(shape, np.uint8), pack(Weight(33, 64, 32))).shape == y.shape
        a, a_scales, a_zps = pyda8w4.quantize_activation(np.empty(shape, F32))
        assert a.shape == shape and a_scales.shape == a_zps.shape == shape[:-1]


@pytest.mark.pitfall("sglang, vLLM", "M > 4 without AMX")
@pytest.mark.parametrize("rows", [4, 5, 6, 8, 9])
def test_four_to_nine_rows(kernel, rows):
    assert_gemm_exact(Weight(64, 128, 32), rows)


@pytest.mark.pitfall("general", "odd K")
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 33, 99, 255, 257, 511, 513])
def test_odd_k(kernel, k):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)
        assert_gemm_exact(Weight(34, k, 4), rows)


@pytest.mark.pitfall("general", "K % 4")
@pytest.mark.parametrize("k", [4, 8, 12, 20, 36, 100, 252, 260])
def test_k_multiple_of_4(kernel, k):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)
        assert_gemm_exact(Weight(34, k, 4), rows)


@pytest.mark.pitfall("general", "K % 64")
@pytest.mark.parametrize("k", [64, 128, 192, 256, 512, 576])
def test_k_multiple_of_64(kernel, k):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)
        assert_gemm_exact(Weight(34, k, 64), rows)


@pytest.mark.pitfall("PyTorch #140208, #149359", "out_features 65 gives NaN; block_n 48")
@pytest.mark.parametrize("n", [1, 31, 33])
def test_n_beside_a_block_of_32(kernel, n):
    for rows in (1, 10, 64):
        assert_gemm_exact(Weight(n, 128, 32), rows, bias=True)
        assert_gemm_exact(Weight(n, 128, 32), rows, bias=True, out="bfloat16")


@pytest.mark.pitfall("torchao", "group sizes other than 32, 64, 128")
@pytest.mark.parametrize("group", [132, 160, 192, 384, 1024])
def test_groups_longer_than_128(kernel, group):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, 2 * group, group), rows)


@pytest.mark.pitfall("onnxruntime #28551", "block_size 512 gives zeros")
def test_groups_of_512(kernel):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, 1024, 512), rows)


@pytest.mark.pitfall("general", "group_size == K")
@pytest.mark.parametrize("k", [4, 64, 100, 300, 600])
def test_one_group_for_all_of_k(kernel, k):
    codes, scales, zps = arrays(Weight(34, k))
    assert_same_weight(
        pyda8w4.prepack(codes, scales[:, 0], zps[:, 0]), pyda8w4.prepack(codes, scales, zps, group_size=k)
    )
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k), rows)


@pytest.mark.pitfall("general", "K % group_size")
@pytest.mark.parametrize("k, group", [(100, 32), (65, 64), (67, 64), (513, 512), (1100, 512), (130, 128), (300, 256)])
def test_a_shorter_last_group(kernel, k, group):
    for rows in (1, 10):
        assert_gemm_exact(Weight(34, k, group), rows)


def test_codes_beyond_k_do_not_count(kernel):
    # Codes beyond k meet activations that are 0, not what an earlier call left in the workspace.
    weight = Weight(33, 65)
    packed = pack(weight)
    codes = stored_arrays(packed)["codes"].copy()
    codes[:, -1, 1::4] = codes[:, -1, 2::4] = codes[:, -1, 3::4] = 0xFF
    dirty = with_stored(packed, codes=codes)
    for rows in (1, 6, 20):
        pyda8w4.gemm(np.full((rows, 190), -1, np.int8), pack(Weight(33, 190)))
        assert_same_bits(pyda8w4.linear(floats(65)[:rows], dirty), pyda8w4.linear(floats(65)[:rows], packed))
