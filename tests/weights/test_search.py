"""The search of `quantize_weight`, against the same search written out in numpy, and against what others find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, floats

import pyda8w4
from pyda8w4.formats import QuantizedWeight

F32 = np.float32
ZEROS = ("float", "integer", "none")
STEPS = np.array([14, 15.6, 17.2, 18.8, 20.4, 22], F32)


def bf16(values: Any) -> Any:
    """Round to nearest even; beyond the largest, that one."""
    values = np.clip(values, F32(-(2.0**127) * (2 - 2**-7)), F32(2.0**127 * (2 - 2**-7)))
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(F32)


def as_scale(values: Any) -> Any:
    least = np.finfo(F32).tiny
    return bf16(np.where((values != 0) & (np.abs(values) < least), np.copysign(least, values), values).astype(F32))


def inverse(values: Any) -> Any:
    return np.where(values != 0, F32(1) / np.where(values != 0, values, F32(1)), F32(0)).astype(F32)


def clip(codes: Any) -> Any:
    return np.clip(codes, F32(0), F32(15))


def total(terms: Any) -> Any:
    """Along the second axis, in order."""
    sums = np.zeros((len(terms), *terms.shape[2:]), F32)
    for i in range(terms.shape[1]):
        sums = sums + terms[:, i]
    return sums


@np.errstate(all="ignore")
def search(x: Any, zeros: str, weights: Any) -> tuple[Any, Any, Any]:
    """-> scale, zero point, and what code 7.5 stands for, of each row of a group."""
    low, high = x.min(1), x.max(1)
    middle = F32(0.5) * low + F32(0.5) * high if zeros == "float" else np.zeros_like(low)
    low, high = low - middle, high - middle
    exponents = np.clip(np.maximum(high, -low).view(np.uint32) & 0x7F800000, 1 << 23, 253 << 23)
    unit = exponents.astype(np.uint32).view(F32)
    low, high = low * (F32(1) / unit), high * (F32(1) / unit)
    x = (x - middle[:, None]) * (F32(1) / unit)[:, None]
    p = np.broadcast_to(weights, x.shape)
    size, first, second = total(p), total(x * p), total(x * p * x)
    if zeros == "integer":
        low, high = np.minimum(low, F32(0)), np.maximum(high, F32(0))
    elif zeros == "none":
        high = np.maximum(high, -low)
        low = -high
    scale = (high - low) / F32(15)
    zero = clip(np.rint(-low * inverse(scale))) if zeros == "integer" else np.full_like(scale, 8)
    center, best = np.zeros_like(scale), np.full_like(scale, np.inf)

    def consider(by: Any, at: Any) -> None:
        nonlocal scale, zero, center, best
        codes = clip(np.rint(x * by[:, None] + at[:, None])) - (F32(7.5) if zeros == "float" else at[:, None])
        weighted = codes * p
        c1, c2, cx = total(weighted), total(weighted * codes), total(weighted * x)
        if zeros == "float":
            spread = size * c2 - c1 * c1
            good = spread > F32(1e-5) * (size * c2)
            s = (size * cx - first * c1) / spread
            c = (first - s * c1) / size
            error = second - c * first - s * cx
        else:
            good = c2 > 0
            s, c = cx / c2, np.zeros_like(cx)
            error = second - s * cx
        good &= error < best
        best, scale, center = np.where(good, error, best), np.where(good, s, scale), np.where(good, c, center)
        if zeros != "float":
            zero = np.where(good, at, zero)

    for steps in STEPS:
        by = steps * inverse(high - low)
        if zeros == "none":
            consider(by, np.full_like(by, 8))
            consider(-by, np.full_like(by, 8))
            continue
        for at in (-low * by, F32(15) - high * by, F32(7.5) - F32(0.5) * (low + high) * by):
            consider(by, clip(np.rint(at)) if zeros == "integer" else at)
    for _ in range(3):
        by = inverse(scale)
        consider(by, F32(7.5) - center * by if zeros == "float" else zero)
    return scale * unit, zero, center * unit + middle


def two_levels(numbers: Any, largest: int) -> tuple[Any, Any]:
    unit = as_scale(np.abs(numbers).max(1) / F32(largest))
    return unit, np.clip(np.rint(numbers * inverse(unit)[:, None]), -largest, largest)


def expected(w: Any, group: int, zeros: str, two_level: bool = False, importance: Any = None) -> dict[str, Any]:
    w, k = w.astype(F32), w.shape[1]
    p = np.ones(k, F32) if importance is None else (importance / importance.max()).astype(F32)
    parts = [slice(begin, min(begin + group, k)) for begin in range(0, k, group)]
    found = [search(w[:, part], zeros, p[part]) for part in parts]
    scales, zps, centers = (np.stack(each, 1) for each in zip(*found))
    offsets = np.zeros_like(scales)
    arrays: dict[str, Any] = {}
    if two_level:
        count = -(-len(parts) // 8)
        size = -(-len(parts) // count)
        supers = [slice(begin, begin + size) for begin in range(0, len(parts), size)]
        pairs = [two_levels(scales[:, part], 127 if zeros == "none" else 255) for part in supers]
        arrays["scales"] = np.stack([unit for unit, _ in pairs], 1)
        arrays["sub_scales"] = np.concatenate([numbers for _, numbers in pairs], 1)
        scales = np.concatenate([unit[:, None] * numbers for unit, numbers in pairs], 1)
    else:
        arrays["scales"] = scales = as_scale(scales)
    if zeros == "float":
        offsets = centers - F32(7.5) * scales
        if two_level:
            pairs = [two_levels(offsets[:, part], 127) for part in supers]
            arrays["offsets"] = np.stack([unit for unit, _ in pairs], 1)
            arrays["sub_offsets"] = np.concatenate([numbers for _, numbers in pairs], 1)
            offsets = np.concatenate([unit[:, None] * numbers for unit, numbers in pairs], 1)
        else:
            arrays["offsets"] = offsets = bf16(offsets)
        zps = np.zeros_like(zps)
    arrays["zps"] = zps
    arrays["codes"] = np.concatenate(
        [
            clip(np.rint((w[:, part] - offsets[:, [g]]) * inverse(scales[:, [g]])) + zps[:, [g]])
            for g, part in enumerate(parts)
        ],
        1,
    )
    return arrays


def check(w: Any, group: int, **options: Any) -> QuantizedWeight:
    weight = pyda8w4.quantize_weight(w, group, **options)
    for name, array in expected(w, min(group, w.shape[1]), **options).items():
        got = getattr(weight, name)
        assert got.shape == array.shape, name
        np.testing.assert_array_equal(got, array, name)
    return weight


def error(weight: QuantizedWeight, w: Any, importance: Any = 1) -> float:
    return float((np.square(weight.pack().dequantize().astype(float) - w) * importance).sum())


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize(
    "n, k, group", [(1, 1, 4), (1, 3, 4), (3, 4, 4), (4, 70, 32), (5, 64, 64), (7, 13, 1000), (9, 400, 32), (2, 90, 8)]
)
def test_as_in_numpy(n: int, k: int, group: int, zeros: str, two_level: bool) -> None:
    check(floats(k)[:n], group, zeros=zeros, two_level=two_level)


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_types(dtype: str, zeros: str) -> None:
    w = floats(70, dtype)[:30]
    check(w, 32, zeros=zeros)
    for got, want in zip(pyda8w4.quantize_weight(w, 32), pyda8w4.quantize_weight(w.astype(F32), 32), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("zeros", ZEROS)
def test_importance(zeros: str, two_level: bool) -> None:
    rng = np.random.default_rng(0)
    w, importance = floats(96)[:30], rng.exponential(size=96) ** 4
    importance[32:64] = 0  # a group that nobody cares about
    with_it = check(w, 32, zeros=zeros, two_level=two_level, importance=importance)
    without = pyda8w4.quantize_weight(w, 32, zeros=zeros, two_level=two_level)
    assert error(with_it, w, importance) < 0.8 * error(without, w, importance)
    assert error(with_it, w) > error(without, w)
    for scaled in (importance * 2.0**1000, importance * 2.0**100, importance * 2.0**-100, importance.astype(">f8")):
        again = pyda8w4.quantize_weight(w, 32, zeros=zeros, two_level=two_level, importance=scaled)
        assert_same_bits(again.codes, with_it.codes)


def rows_of_every_kind() -> Any:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(16)
    rows = [
        0 * noise, 0 * noise + 3, 0 * noise - 3, noise, 1000 + noise, np.abs(noise), -np.abs(noise), noise**9,
        np.where(np.arange(16) == 5, 100, noise), np.where(np.arange(16) == 5, 1, 0), np.sign(noise),
    ]  # fmt: skip
    return np.array(rows, F32)


@pytest.mark.parametrize("zeros", ZEROS)
def test_rows_of_every_kind(zeros: str) -> None:
    w = rows_of_every_kind()
    weight = check(w, 16, zeros=zeros)
    assert np.isfinite(weight.pack().dequantize()).all()
    assert not weight.pack().dequantize()[0].any()
    for exponent in (-150, -126, -40, 40, 115):
        check(np.ldexp(w, exponent), 16, zeros=zeros)
    # Nothing overflows where the range of a group does not.
    check(np.array([[1.2e38, -1.2e38, 1e38, 0]], F32), 4, zeros=zeros)
    with pytest.raises(ValueError, match="range fits float32"):
        pyda8w4.quantize_weight(np.array([[3e38, -3e38, 1e38, 0]], F32), 4, zeros=zeros)


@pytest.mark.parametrize("zeros", ZEROS)
def test_powers_of_two_change_no_code(zeros: str) -> None:
    w = floats(70)[:30]
    weight = pyda8w4.quantize_weight(w, 32, zeros=zeros)
    for exponent in (-90, -7, 1, 90):
        power = F32(2.0**exponent)
        got = pyda8w4.quantize_weight(w * power, 32, zeros=zeros)
        assert_same_bits(got.codes, weight.codes)
        assert_same_bits(got.scales, weight.scales * power)


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("zeros", ZEROS)
def test_it_beats_minmax(zeros: str, two_level: bool) -> None:
    w = np.random.default_rng(2).standard_normal((256, 512), F32)
    for group, gain in ((32, 1.04), (128, 1.1)):
        minmax = error(pyda8w4.quantize_weight(w, group, method="minmax", zeros=zeros), w)
        assert gain * error(pyda8w4.quantize_weight(w, group, zeros=zeros, two_level=two_level), w) < minmax


def test_it_is_near_the_best_that_there_is() -> None:
    """Of eight numbers, against a thousand scales times a hundred places."""
    w = np.random.default_rng(3).standard_normal((20, 8), F32)
    weight = pyda8w4.quantize_weight(w, 8)
    found = np.square(weight.pack().dequantize() - w).sum(1)
    size = np.ptp(w, axis=1)[:, None, None, None]
    s = size / np.linspace(12, 40, 1000)[:, None, None]
    o = w.min(1)[:, None, None, None] + s * np.linspace(-3, 3, 100)[:, None]
    x = w[:, None, None, :]
    best = np.square(np.clip(np.rint((x - o) / s), 0, 15) * s + o - x).sum(3).min((1, 2))
    assert found.sum() < 1.4 * best.sum()


def test_groups_of_8_bits_of_scales_lose_little() -> None:
    w = np.random.default_rng(4).standard_normal((64, 1024), F32)
    one, two = (pyda8w4.quantize_weight(w, 32, two_level=two_level) for two_level in (False, True))
    assert error(two, w) < 1.02 * error(one, w)
    assert one.pack().nbytes * 8 / w.size < 5.04 and two.pack().nbytes * 8 / w.size < 4.67


def test_parts_by_position() -> None:
    w = floats(64)[:5]
    for zeros, count in (("float", 4), ("integer", 3), ("none", 3)):
        weight = pyda8w4.quantize_weight(w, 32, zeros=zeros)
        assert len([*weight]) == count
        assert_same_bits(pyda8w4.prepack(*weight).dequantize(), pyda8w4.quantize(w, 32, zeros=zeros).dequantize())
    with pytest.raises(ValueError, match="use pack"):
        pyda8w4.prepack(*pyda8w4.quantize_weight(w, 32, two_level=True))
    with pytest.raises(ValueError, match="use pack"):
        [*QuantizedWeight(weight.codes, weight.scales)]
    for k, group in ((96, 64), (100, 48)):
        weight = pyda8w4.quantize_weight(floats(k), group)
        assert_same_bits(pyda8w4.prepack(*weight, group_size=group).dequantize(), weight.pack().dequantize())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    w = np.random.default_rng(5).standard_normal((301, 700), F32)
    want = pyda8w4.quantize_weight(w, 64)
    pyda8w4.set_num_threads(threads)
    try:
        for got, part in zip(pyda8w4.quantize_weight(w, 64), want, strict=True):
            assert_same_bits(got, part)
    finally:
        pyda8w4.set_num_threads(None)


def hadamard(size: int) -> Any:
    """Sylvester's."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotation_matrix(blocks: list[int]) -> Any:
    whole, begin = np.zeros((sum(blocks), sum(blocks))), 0
    for size in blocks:
        whole[begin : begin + size, begin : begin + size] = hadamard(size)
        begin += size
    return whole


@pytest.mark.parametrize("method", ["search", "minmax"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    "k, rotate, blocks",
    [
        (64, 32, [32, 32]),
        (100, True, [32, 32, 32, 4]),
        (55, 32, [32, 16, 4, 2, 1]),
        (24, 1024, [16, 8]),
        (3, 2, [2, 1]),
    ],
)
def test_rotation(k: int, rotate: int, blocks: list[int], dtype: str, method: str) -> None:
    w, matrix = floats(k, dtype)[:20], rotation_matrix(blocks)
    w = np.rint(w.astype(F32) * 64).astype(w.dtype)  # sums of which are exact
    weight = pyda8w4.quantize_weight(w, 32, rotate=rotate, method=method)
    turned = (w.astype(float) @ matrix / np.repeat(blocks, blocks)).astype(F32)
    plain = pyda8w4.quantize_weight(turned, 32, method=method)
    for got, want in zip((weight.codes, weight.scales, weight.offsets), (plain.codes, plain.scales, plain.offsets)):
        np.testing.assert_array_equal(got, want)  # of zeros, signs may differ
    assert weight.rotation == weight.pack().rotation == (32 if rotate is True else rotate)
    np.testing.assert_allclose(weight.pack().dequantize(), plain.pack().dequantize() @ matrix, rtol=1e-4, atol=1e-3)


def test_importance_of_a_rotated_weight_is_that_of_blocks() -> None:
    w, importance = np.rint(floats(55)[:20] * 64), np.arange(55.0)
    blocks = [32, 16, 4, 2, 1]
    sums = np.concatenate(
        [np.full(size, part.sum()) for size, part in zip(blocks, np.split(importance, np.cumsum(blocks)))]
    )
    turned = (w.astype(float) @ rotation_matrix(blocks) / np.repeat(blocks, blocks)).astype(F32)
    got = pyda8w4.quantize_weight(w, 32, rotate=32, importance=importance)
    want = pyda8w4.quantize_weight(turned, 32, importance=sums)
    np.testing.assert_array_equal(got.codes, want.codes)


def test_rotation_helps_weights_with_outliers() -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((64, 512), F32)
    w[:, ::37] *= 20
    for group in (32, 128):
        plain, turned = (error(pyda8w4.quantize_weight(w, group, rotate=rotate), w) for rotate in (0, 32))
        assert turned < 0.9 * plain
