"""Every kernel of this build against `pyda8w4.reference`, bit for bit: ``pyda8w4 selftest``.

>>> from pyda8w4 import selftest
>>> [result.difference for result in selftest.run("scalar")]
[None]
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4 import _core, reference
from pyda8w4._checks import ACTIVATIONS, INTEGERS, SCHEMES, dtype_of
from pyda8w4._experts import stack
from pyda8w4._format import KINDS
from pyda8w4._linear import gemm, linear, linear_gated
from pyda8w4._moe import grouped_linear, moe
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
_EXPERTS = 3


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
    digest : str or None
        The start of the SHA-256 of all that it computed: equal for builds that compute the same, with one version of
        numpy, which makes the operands.
    """

    kernel: str
    cases: int = 0
    reason: str | None = None
    difference: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.reason:
            return f"not run: {self.reason}"
        return (
            f"DIFFERS in {self.difference}"
            if self.difference
            else f"bit-identical ({self.cases} cases, digest {self.digest})"
        )


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
            results.append(_compare(name, cases))
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


def _compare(kernel: str, cases: list[_Case]) -> Result:
    computed = hashlib.sha256()
    for case in cases:
        results = _bits(case.call())
        difference = _difference(case, results)
        if difference:
            return Result(kernel, len(cases), difference=difference)
        for result in results:
            computed.update(result.astype(result.dtype.newbyteorder("<")).tobytes())
    return Result(kernel, len(cases), digest=computed.hexdigest()[:16])


def _difference(case: _Case, results: list[npt.NDArray[Any]]) -> str | None:
    for got, expected in zip(results, _bits(case.expected), strict=True):
        wrong = np.argwhere(got != expected)
        if len(wrong):
            at = tuple(map(int, wrong[0]))
            digits = 2 * got.itemsize
            return (
                f"case {case.name}: {len(wrong)} of {got.size} values, first at {at}: "
                f"bits {got[at]:0{digits}x} instead of {expected[at]:0{digits}x}"
            )
    return None


def _bits(arrays: Any) -> list[npt.NDArray[Any]]:
    arrays = arrays if isinstance(arrays, tuple) else (arrays,)
    return [array.view(f"u{array.itemsize}") for array in arrays]


def _float_types() -> tuple[str, ...]:
    found = importlib.util.find_spec("ml_dtypes") is not None
    return ("float32", "float16", "bfloat16") if found else ("float32", "float16")


def _cases() -> Iterator[_Case]:
    rng = np.random.default_rng(0)
    for shape_number, (m, n, k, group) in enumerate(_SHAPES):
        yield from _quantize_cases(rng, m, k)
        yield from _gemm_cases(rng, m, n, k, group, shape_number)
        for number, (x_type, act, biased) in enumerate(product(_float_types(), SCHEMES, (False, True))):
            # Whatever a weight may have alternates, so that every kind meets every scheme.
            yield from _linear_cases(rng, m, _weight(rng, n, k, group, 7 * shape_number + number), x_type, act, biased)
        for number in (2 * shape_number, 2 * shape_number + 1):
            yield from _experts_cases(rng, min(m, 20), n, k, group, number)


@dataclass(frozen=True)
class _Weight:
    """A weight, and what the reference takes for it."""

    packed: PackedWeight
    arguments: dict[str, Any]

    def __str__(self) -> str:
        packed = self.packed
        parts = [
            f"{packed.bits} bits",
            f"{packed.scale_dtype}{' two-level' if packed.super_size else ''} scales",
            "a zero point per group" if packed.zero_point is None else "one zero point",
            *(name for name in ("table", "perm", "factors") if name in self.arguments),
            *(["offsets"] if packed.has_offsets else []),
            *([f"rotation {packed.rotation}"] if packed.rotation else []),
        ]
        return ", ".join(parts)


def _weight(rng: np.random.Generator, n: int, k: int, group: int, number: int, zp_range: int = 16) -> _Weight:
    """One of many sorts of weights, by its number."""
    bits, has_table = list(KINDS)[number % len(KINDS)]
    scale_type = ("float16", "bfloat16", "float32")[number % 3]
    two_levels, same_zp, has_offsets = number // 5 % 2 == 1, number % 4 == 0 or has_table, number // 2 % 2 == 1
    groups = -(-k // group)
    supers = -(-groups // -(-groups // 3)) if two_levels else groups
    kind = KINDS[bits, has_table]
    zp = 0 if has_table else (kind.least + kind.most + 1) // 2
    zps = np.full((n, groups), zp) if same_zp else zp + rng.integers(-zp_range // 2, zp_range // 2, (n, groups))
    given: dict[str, Any] = {
        "codes": rng.integers(kind.least, kind.most, (n, k), kind.dtype, endpoint=True),
        "scales": _scales(rng, (n, supers), scale_type),
        "zps": zps.astype(np.int8),
    }
    if has_offsets:
        given["offsets"] = rng.permutation(given["scales"])  # which fit the type of the scales
    if two_levels:
        given["sub_scales"] = rng.integers(0, 64, (n, groups), np.uint8)
        if has_offsets:
            given["sub_offsets"] = rng.integers(-128, 127, (n, groups), np.int8, endpoint=True)
    if has_table:
        given["table"] = rng.permutation(np.arange(-128, 128, 16)).astype(np.int8)
    if number % 7 == 3:
        given["perm"] = rng.permutation(k).astype(np.int32)
    if number % 11 == 6:
        given["factors"] = rng.uniform(0.5, 2, k).astype(np.float32)
    if number % 6 == 5:
        given["rotation"] = (2, 16, 128, 1024)[number // 6 % 4]
    packed = prepack(**given, bits=bits, group_size=group)
    return _Weight(packed, {**given, "group_size": group})


def _scales(rng: np.random.Generator, shape: tuple[int, int], scale_type: str) -> npt.NDArray[np.float32]:
    """Scales that are stored in this type, with few enough bits to be exact when multiplied by a whole number."""
    digits = {"float16": 11, "bfloat16": 8, "float32": 16}[scale_type]
    whole = rng.integers(1 << (digits - 1), 1 << digits, shape) * rng.choice([-1, 1], shape)
    whole[0, 0] |= 1  # which needs all digits
    scales: npt.NDArray[np.float32] = np.ldexp(whole.astype(np.float32), -(digits + 5))
    if scale_type == "bfloat16":
        scales[-1, -1] = 2.0**-40  # which float16 cannot hold
    return scales


def _activations(rng: np.random.Generator, m: int, k: int, x_type: str) -> npt.NDArray[Any]:
    x = rng.standard_normal((m, k), np.float32) * np.float32(3) + np.float32(0.5)
    if m > 3:  # rows of which quantization has something special to say
        x[0] = 0
        x[1, k // 2] = np.nan
        x[2, -1] = -np.inf
        x[3] = np.abs(x[3])
    return x.astype(dtype_of(x_type))


def _quantize_cases(rng: np.random.Generator, m: int, k: int) -> Iterator[_Case]:
    for x_type, act in product(_float_types(), INTEGERS):
        x = _activations(rng, m, k, x_type)
        yield _Case(
            f"quantize_activation {m}x{k} of {x_type} to {act}",
            partial(quantize_activation, x, act),
            reference.quantize_activation(x, act),
        )


def _gemm_cases(rng: np.random.Generator, m: int, n: int, k: int, group: int, shape_number: int) -> Iterator[_Case]:
    for number, dtype in enumerate((np.uint8, np.int8, np.uint8, np.int8)):
        weight = _weight(rng, n, k, group, 12 + 5 * shape_number + 3 * number, zp_range=200)
        if weight.packed.factors is not None or weight.packed.rotation:  # which gemm refuses
            continue
        limits = np.iinfo(dtype)
        a = rng.integers(limits.min, limits.max, (m, k), dtype, endpoint=True)
        a[:, :: rng.integers(1, 4)] = rng.choice([limits.min, limits.max])  # whatever saturates does it here
        scales = rng.uniform(0.01, 1, m).astype(np.float32)
        zps = rng.integers(limits.min, limits.max, m, np.int32, endpoint=True)
        for operands in ((None, None), (scales, zps)):
            yield _Case(
                f"gemm {_sizes(m, weight)} of {dtype.__name__}, {weight}"
                f"{'' if operands[0] is None else ', with scales and zero points of rows'}",
                partial(gemm, a, weight.packed, *operands),
                reference.gemm(a, a_scales=operands[0], a_zps=operands[1], **weight.arguments),
            )


def _linear_cases(
    rng: np.random.Generator, m: int, weight: _Weight, x_type: str, act: str, biased: bool
) -> Iterator[_Case]:
    n, k = weight.packed.shape
    x = _activations(rng, m, k, x_type)
    bias = rng.standard_normal(n, np.float32) if biased else None
    y = reference.linear(x, bias=bias, act=act, **weight.arguments)
    for out_type in _float_types():
        yield _Case(
            f"linear {_sizes(m, weight)} of {x_type} as {act}, {weight}{', bias' if biased else ''}, to {out_type}",
            partial(linear, x, weight.packed, bias, act=act, out_dtype=out_type),
            reference.convert(y, out_type),
        )


def _experts_cases(rng: np.random.Generator, m: int, n: int, k: int, group: int, number: int) -> Iterator[_Case]:
    """Of one of many mixtures of experts, with `n` gates and ups."""
    activation, act, interleaved = list(ACTIVATIONS)[number % 4], list(SCHEMES)[number // 3 % 4], number // 4 % 2 == 1
    gate_up = [_weight(rng, 2 * n, k, group, number) for _ in range(_EXPERTS)]
    down = [_weight(rng, k, n, group if group % 4 == 0 and group < n else n, number + 3) for _ in range(_EXPERTS)]
    experts, all_down = (stack([weight.packed for weight in weights]) for weights in (gate_up, down))
    arguments, down_arguments = ([weight.arguments for weight in weights] for weights in (gate_up, down))
    x = _activations(rng, m, k, "float32")
    bias, down_bias = (rng.standard_normal((_EXPERTS, size), np.float32) for size in (2 * n, k))
    more: dict[str, Any] = {"activation": activation, "interleaved": interleaved, "act": act}
    name = f"{_sizes(m, gate_up[0])} as {act}, {gate_up[0]}, {activation}{' interleaved' if interleaved else ''}"
    yield _Case(
        f"linear_gated {name}",
        partial(linear_gated, x, gate_up[0].packed, bias[0], **more),
        reference.linear_gated(x, arguments[0], bias[0], **more),
    )
    ids = rng.integers(-1, _EXPERTS, (m, 2), np.int32)
    weights = rng.standard_normal((m, 2), np.float32)
    more |= {"gate_up_bias": bias, "down_bias": down_bias}
    yield _Case(
        f"moe {name}",
        partial(moe, x, experts, all_down, ids, weights, **more),
        reference.moe(x, arguments, down_arguments, ids, weights, **more),
    )
    expert_of = np.sort(rng.integers(0, _EXPERTS, m))
    rows = [x[expert_of == expert] for expert in range(_EXPERTS)]
    yield _Case(
        f"grouped_linear {name}",
        partial(grouped_linear, x, experts, [len(part) for part in rows], act=act),
        np.concatenate(
            [reference.linear(part, act=act, **weight) for part, weight in zip(rows, arguments) if len(part)]
        ),
    )


def _sizes(m: int, weight: _Weight) -> str:
    n, k = weight.packed.shape
    return f"{m}x{n}x{k} in groups of {weight.packed.group_size}"
