"""Every kernel of this build against `pyda8w4.reference`, bit for bit: ``pyda8w4 selftest``.

>>> from pyda8w4 import selftest
>>> [result.difference for result in selftest.run("scalar")]
[None]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from pyda8w4 import _core, reference
from pyda8w4._checks import dtype_of
from pyda8w4._linear import gemm, linear
from pyda8w4._packed import PackedWeight
from pyda8w4._prepack import prepack
from pyda8w4._quantize import quantize_activation
from pyda8w4._runtime import use_kernel

__all__ = ["Result", "main", "run"]

# m, n, k, group size. What may go wrong is at borders: of quads (4 of k), blocks (32 of n), tiles of
# rows, the last and shorter group, and the pieces in which long groups and many rows are worked on.
_SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 7, 4),
    (2, 32, 128, 32),
    (3, 95, 300, 128),
    (4, 40, 1300, 640),
    (5, 31, 1030, 1030),
    (6, 64, 516, 260),
    (16, 96, 256, 64),
    (23, 70, 333, 36),
    (37, 33, 1201, 1201),
    (41, 40, 1300, 640),
    (250, 33, 260, 128),
]


@dataclass(frozen=True)
class Result:
    """What became of one kernel.

    Parameters
    ----------
    kernel : str
        Its name.
    cases : int
        How many were compared.
    reason : str or None
        Why it was not run.
    difference : str or None
        Where it first left the reference.
    """

    kernel: str
    cases: int = 0
    reason: str | None = None
    difference: str | None = None

    def __str__(self) -> str:
        if self.reason:
            return f"not run: {self.reason}"
        return f"DIFFERS in {self.difference}" if self.difference else f"bit-identical ({self.cases} cases)"


@dataclass(frozen=True)
class _Case:
    """A call, and what it must return: an array or a tuple of them."""

    name: str
    call: Callable[[], Any]
    expected: Any


def run(kernel: str | None = None) -> list[Result]:
    """Compare kernels with the reference.

    Parameters
    ----------
    kernel : str, optional
        Only this one.

    Returns
    -------
    list of Result
        Of every kernel of this build, best first, or of the one.

    Raises
    ------
    ValueError
        If there is no such kernel.
    """
    reasons = {name: reason for name, _, reason in _core.kernel_table()}
    if kernel is not None and kernel not in reasons:
        raise ValueError(f"kernel must be one of {', '.join(reasons)}, got {kernel!r}")
    cases = list(_cases())
    results = []
    for name in reasons if kernel is None else [kernel]:
        if reasons[name]:
            results.append(Result(name, reason=reasons[name]))
            continue
        with use_kernel(name):
            difference = next(filter(None, map(_difference, cases)), None)
        results.append(Result(name, len(cases), difference=difference))
    return results


def main(kernel: str | None = None) -> int:
    """Print one line for each kernel and return the exit status: 1 if any of them differs.

    Parameters
    ----------
    kernel : str, optional
        Only this one.

    Returns
    -------
    int
        Exit status: 1 where a kernel differs, else 0.
    """
    results = run(kernel)
    for result in results:
        print(f"{result.kernel:<12} {result}")
    differing = [result.kernel for result in results if result.difference]
    run_count = sum(not result.reason for result in results)
    if "bfloat16" not in _float_types():
        print("bfloat16 inputs and outputs were not checked: ml_dtypes is not installed")
    if differing:
        print(f"FAILED: {', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'} from the reference")
        return 1
    kernels = "1 kernel gives" if run_count == 1 else f"{run_count} kernels give"
    print(f"OK: {kernels} the bits of pyda8w4.reference")
    return 0


def _difference(case: _Case) -> str | None:
    for got, expected in zip(_bits(case.call()), _bits(case.expected), strict=True):
        wrong = np.argwhere(got != expected)
        if len(wrong):
            at = tuple(map(int, wrong[0]))
            digits = 2 * got.itemsize
            return (
                f"case {case.name}: {len(wrong)} of {got.size} values, first at {at}: "
                f"bits {got[at]:0{digits}x} instead of {expected[at]:0{digits}x}"
            )
    return None


def _bits(arrays: Any) -> list[np.ndarray]:
    arrays = arrays if isinstance(arrays, tuple) else (arrays,)
    return [array.view(f"u{array.itemsize}") for array in arrays]


def _float_types() -> tuple[str, ...]:
    found = importlib.util.find_spec("ml_dtypes") is not None
    return ("float32", "float16", "bfloat16") if found else ("float32", "float16")


def _cases() -> Iterator[_Case]:
    rng = np.random.default_rng(0)
    for shape_number, (m, n, k, group) in enumerate(_SHAPES):
        yield from _quantize_cases(rng, m, k)
        yield from _gemm_cases(rng, m, n, k, group)
        options = product(_float_types(), (False, True), (False, True), (False, True))
        for number, (x_type, symmetric, biased, same_zp) in enumerate(options):
            # The types in which scales are stored alternate.
            scale_type = ("float16", "bfloat16", "float32")[(shape_number + number) % 3]
            weight = _weight(rng, n, k, group, scale_type, same_zp, offsets=(shape_number + number // 8) % 2 == 1)
            yield from _linear_cases(rng, m, weight, x_type, symmetric, biased)


def _weight(
    rng: np.random.Generator,
    n: int,
    k: int,
    group: int,
    scale_type: str,
    same_zp: bool,
    zp_range: int = 16,
    *,
    offsets: bool,
) -> PackedWeight:
    groups = -(-k // group)
    scales = rng.uniform(0.5, 1.5, (n, groups)).astype(np.float32) / np.float32(k)
    if scale_type == "float16":
        scales = scales.astype(np.float16)
    elif scale_type == "bfloat16":
        scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
        scales[-1, -1] = 2.0**-40  # which float16 cannot hold
    zps = np.full((n, groups), 7) if same_zp else rng.integers(8 - zp_range // 2, 8 + zp_range // 2, (n, groups))
    codes = rng.integers(0, 16, (n, k), np.uint8)
    shuffled = rng.permutation(scales) if offsets else None  # fit the type of the scales
    return prepack(codes, scales, zps.astype(np.int8), shuffled, group_size=group)


def _arguments(weight: PackedWeight) -> dict[str, Any]:
    """Of the reference, by name."""
    names = ("w_int4", "scales", "zps", "offsets")
    return {"group_size": weight.group_size, **dict(zip(names, weight.unpack()))}


def _activations(rng: np.random.Generator, m: int, k: int, x_type: str) -> np.ndarray:
    x = rng.standard_normal((m, k), np.float32) * np.float32(3) + np.float32(0.5)
    if m > 3:  # rows of which quantization has something special to say
        x[0] = 0
        x[1, k // 2] = np.nan
        x[2, -1] = -np.inf
        x[3] = np.abs(x[3])
    return x.astype(dtype_of(x_type))


def _quantize_cases(rng: np.random.Generator, m: int, k: int) -> Iterator[_Case]:
    for x_type, symmetric in product(_float_types(), (False, True)):
        x = _activations(rng, m, k, x_type)
        yield _Case(
            f"quantize_activation {m}x{k} of {x_type}, {_kind(symmetric)}",
            partial(quantize_activation, x, symmetric),
            reference.quantize_activation(x, symmetric),
        )


def _gemm_cases(rng: np.random.Generator, m: int, n: int, k: int, group: int) -> Iterator[_Case]:
    for dtype, offsets in product((np.uint8, np.int8), (False, True)):
        weight = _weight(rng, n, k, group, "float32", same_zp=False, zp_range=200, offsets=offsets)
        limits = np.iinfo(dtype)
        a = rng.integers(limits.min, limits.max, (m, k), dtype, endpoint=True)
        a[:, :: rng.integers(1, 4)] = rng.choice([limits.min, limits.max])  # whatever saturates does it here
        scales = rng.uniform(0.01, 1, m).astype(np.float32)
        zps = rng.integers(limits.min, limits.max, m, np.int32, endpoint=True)
        for operands in ((None, None), (scales, zps)):
            yield _Case(
                f"gemm {_sizes(m, weight)} of {a.dtype}{'' if operands[0] is None else ' with scales and zero points'}"
                f"{', offsets' if offsets else ''}",
                partial(gemm, a, weight, *operands),
                reference.gemm(a, a_scales=operands[0], a_zps=operands[1], **_arguments(weight)),
            )


def _linear_cases(
    rng: np.random.Generator, m: int, weight: PackedWeight, x_type: str, symmetric: bool, biased: bool
) -> Iterator[_Case]:
    n, k = weight.shape
    x = _activations(rng, m, k, x_type)
    bias = rng.standard_normal(n, np.float32) if biased else None
    y = reference.linear(x, bias=bias, symmetric=symmetric, **_arguments(weight))
    for out_type in _float_types():
        zero_points = "a zero point per group" if weight.zero_point is None else "one zero point"
        yield _Case(
            f"linear {_sizes(m, weight)} of {x_type}, {_kind(symmetric)}, {weight.scale_dtype} scales, {zero_points}"
            f"{', offsets' if weight.has_offsets else ''}{', bias' if biased else ''}, to {out_type}",
            partial(linear, x, weight, bias, symmetric=symmetric, out_dtype=out_type),
            reference.convert(y, out_type),
        )


def _kind(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _sizes(m: int, weight: PackedWeight) -> str:
    n, k = weight.shape
    return f"{m}x{n}x{k} in groups of {weight.group_size}"
