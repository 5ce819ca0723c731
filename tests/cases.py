"""Weights, activations and expected results that several tests share.

Everything is computed once per process: the kernels are compared with the same oracle results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np

import pyda8w4
from pyda8w4 import reference

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MOST_ROWS = 70


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, about: object = "") -> None:
    assert actual.shape == expected.shape, about
    assert actual.dtype.itemsize == expected.dtype.itemsize, about
    wrong = np.argwhere(bits(actual) != bits(expected))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{about}: {len(wrong)} of {actual.size} values differ, first at {at}: {actual[at]!r}, not {expected[at]!r}"
        )


def stored_arrays(packed: pyda8w4.PackedWeight) -> dict[str, np.ndarray]:
    """The arrays of docs/packed-format.md. Only this and `with_stored` look inside a PackedWeight."""
    return packed._arrays


def with_stored(packed: pyda8w4.PackedWeight, **arrays: np.ndarray) -> pyda8w4.PackedWeight:
    """The weight with other arrays in the place of its own."""
    return pyda8w4.PackedWeight._from_arrays(packed._format, {**stored_arrays(packed), **arrays})


def packed_bytes(packed: pyda8w4.PackedWeight) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in stored_arrays(packed).items()}


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


FIELDS = (
    "shape",
    "bits",
    "group_size",
    "super_size",
    "scale_dtype",
    "sub_scale_dtype",
    "sub_offset_dtype",
    "zero_point",
    "rotation",
)


def assert_same_weight(actual: pyda8w4.PackedWeight, expected: pyda8w4.PackedWeight) -> None:
    for field in FIELDS:
        assert getattr(actual, field) == getattr(expected, field), field
    assert packed_bytes(actual) == packed_bytes(expected)


def assert_unpacks_to(packed, codes, scales, zps, *offsets):
    """Of one level."""
    got = packed.unpack()
    code = np.int8 if packed.bits == 8 else np.uint8
    assert [array.dtype for array in got] == [code, np.float32, np.int8, np.float32][: 3 + len(offsets)]
    np.testing.assert_array_equal(got[0], codes)
    assert_same_bits(got[1], scales.astype(np.float32))
    np.testing.assert_array_equal(got[2], zps)
    assert packed.has_offsets == bool(offsets)
    for array, given in zip(got[3:], offsets, strict=True):
        assert_same_bits(array, given.astype(np.float32))
    more = {name: getattr(packed, name) for name in ("bits", "table", "perm", "factors", "rotation")}
    assert_same_weight(pyda8w4.prepack(*got, **more, group_size=packed.group_size), packed)


@dataclass(frozen=True)
class Weight:
    """A random weight matrix.

    `zps`: "random" within 8 of the middle, "extreme" -128 or 127, or one number for all; 0 with a table. `supers`:
    groups of a super-group, or 0.
    """

    n: int
    k: int
    group: int | None = None  # None: all of k
    scales: str = "float32"
    zps: str | int = "random"
    offsets: bool = False
    bits: int = 4
    table: bool = False
    supers: int = 0
    perm: bool = False
    factors: bool = False
    rotation: int = 0

    @property
    def group_size(self) -> int:
        return min(self.group or self.k, self.k)

    @property
    def options(self) -> dict[str, int]:
        """Arguments of prepack beside the arrays."""
        return {"bits": self.bits, "rotation": self.rotation, "group_size": self.group_size}

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.n, self.k, self.group_size])

    def __str__(self) -> str:
        parts = [f"{self.n}x{self.k}", f"g{self.group_size}", f"{self.bits}bit", self.scales, f"zps={self.zps}"]
        parts += [name for name in ("offsets", "table", "perm", "factors") if getattr(self, name)]
        parts += [f"{name}={getattr(self, name)}" for name in ("supers", "rotation") if getattr(self, name)]
        return ",".join(parts)


# Shapes with tails, every type of scales, zero points of each kind, with offsets and without.
SOME = [
    Weight(1, 1),
    Weight(31, 5),
    Weight(33, 70, 32, "float16"),
    Weight(64, 64, 16, "bfloat16", "extreme"),
    Weight(65, 259, 100, zps=8),
    Weight(97, 520, 256, zps=-128),
    Weight(33, 70, 32, "float16", offsets=True),
    Weight(97, 130, 64, "bfloat16", 0, offsets=True),
]

# What codes of more bits, tables, two levels, permutations, factors and rotations add, in shapes whose units of lines
# and blocks of rotations have tails.
KINDS = [
    Weight(1, 1, bits=5),
    Weight(33, 70, 32, "float16", bits=5),
    Weight(65, 259, 100, bits=5, offsets=True, perm=True),
    Weight(31, 5, bits=6, zps="extreme"),
    Weight(64, 268, 20, "float16", 0, supers=4, bits=6),
    Weight(47, 600, 36, "bfloat16", bits=6, offsets=True, supers=3, factors=True),
    Weight(3, 7, 4, bits=8),
    Weight(33, 130, 32, "float16", 0, bits=8),
    Weight(97, 1030, None, "float32", "extreme", bits=8, perm=True, factors=True),
    Weight(40, 300, 128, "float32", "random", offsets=True, bits=8, supers=2),
    Weight(33, 70, 32, "float16", 0, table=True),
    Weight(65, 520, 16, "bfloat16", 0, table=True, supers=5, perm=True, offsets=True),
    Weight(64, 512, 32, "float16", 0, offsets=True, supers=8),
    Weight(35, 268, 24, "float32", supers=1, factors=True),
    Weight(33, 260, 64, perm=True, factors=True, offsets=True),
    Weight(33, 55, zps=8, rotation=32),
    Weight(64, 268, 20, "float16", bits=5, rotation=4),
    Weight(40, 1108, 128, "float16", offsets=True, perm=True, factors=True, rotation=1024),
]


@cache
def given(weight: Weight) -> dict[str, np.ndarray]:
    """What is packed, by name: arguments of prepack and of the oracle. Floats have the requested dtype."""
    rng, n, k = weight.rng(), weight.n, weight.k
    groups = -(-k // weight.group_size)
    supers = -(-groups // weight.supers) if weight.supers else groups
    least, most = (-128, 127) if weight.bits == 8 else (0, (1 << weight.bits) - 1)
    found = {"codes": rng.integers(least, most, (n, k), np.int8 if least else np.uint8, endpoint=True)}

    def floats_of(size: float) -> np.ndarray:
        if weight.scales == "bfloat16":
            size *= 2.0**-40  # beyond float16, so that these must be stored as bfloat16
        drawn = (rng.standard_normal((n, supers)) * size).astype(np.float32)
        if weight.supers and weight.scales == "float32":  # few enough digits, and too small for float16
            drawn = drawn.astype(np.float16).astype(np.float32) * np.float32(2.0**-30)
        return drawn.astype(DTYPES[weight.scales])

    found["scales"] = floats_of(0.01)
    middle = (least + most + 1) // 2
    if weight.zps == "random":
        found["zps"] = rng.integers(middle - 8, middle + 8, (n, groups), np.int8)
    elif weight.zps == "extreme":
        found["zps"] = rng.choice(np.array([-128, 127], np.int8), (n, groups))
    else:
        found["zps"] = np.full((n, groups), weight.zps, np.int8)
    if weight.offsets:
        found["offsets"] = floats_of(0.1)
    if weight.supers:
        found["sub_scales"] = rng.integers(0, 255, (n, groups), np.uint8, endpoint=True)
        if weight.offsets:
            found["sub_offsets"] = rng.integers(-128, 127, (n, groups), np.int8, endpoint=True)
    if weight.table:
        found["table"] = rng.integers(-128, 127, 16, np.int8, endpoint=True)
    if weight.perm:
        found["perm"] = rng.permutation(k).astype(np.int32)
    if weight.factors:
        found["factors"] = rng.uniform(-2, 2, k).astype(np.float32)
    for array in found.values():
        array.flags.writeable = False
    return found


def arrays(weight: Weight) -> tuple[np.ndarray, ...]:
    """-> codes, scales, zero points, and offsets if there are any."""
    found = given(weight)
    return tuple(found[name] for name in ("codes", "scales", "zps", "offsets") if name in found)


@cache
def pack(weight: Weight) -> pyda8w4.PackedWeight:
    return pyda8w4.prepack(**given(weight), **weight.options)


@cache
def given_experts(weight: Weight, count: int) -> tuple[dict[str, np.ndarray], ...]:
    """What is packed for each of so many experts, which differ in all arrays and have one format."""
    experts = []
    for i in range(count):
        rng = np.random.default_rng([i, weight.n, weight.k])
        changed = {}
        for name, array in given(weight).items():
            if name in ("table", "perm"):
                changed[name] = rng.permutation(array)
            elif name == "factors":
                changed[name] = array[::-1] * np.float32(i + 1)
            else:
                changed[name] = array[rng.permutation(len(array))]
        experts.append(changed)
    return tuple(experts)


@cache
def pack_each(weight: Weight, count: int) -> tuple[pyda8w4.PackedWeight, ...]:
    return tuple(pyda8w4.prepack(**found, **weight.options) for found in given_experts(weight, count))


@cache
def pack_experts(weight: Weight, count: int) -> pyda8w4.PackedExperts:
    return pyda8w4.stack(pack_each(weight, count))


@cache
def reference_experts(weight: Weight, count: int) -> tuple[dict, ...]:
    """As `reference.moe` takes them."""
    return tuple(
        {name: array.astype(np.float32) if name in ("scales", "offsets") else array for name, array in found.items()}
        | {"group_size": weight.group_size, "rotation": weight.rotation}
        for found in given_experts(weight, count)
    )


def prepack(codes, zps=None, scales=None, offsets=None, **more):
    """From lists as well as arrays, with scales of 1."""
    codes = np.asarray(codes)
    scales = np.ones(len(codes), np.float32) if scales is None else np.asarray(scales, np.float32)
    return pyda8w4.prepack(codes, scales, None if zps is None else np.asarray(zps), offsets, **more)


def reference_weight(weight: Weight) -> dict[str, np.ndarray | int]:
    """The arrays as arguments of the oracle, by name, and the rotation."""
    found = {
        name: array.astype(np.float32) if name in ("scales", "offsets") else array
        for name, array in given(weight).items()
    }
    return {**found, "rotation": weight.rotation} if weight.rotation else found


@cache
def bias_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal(n, np.float32)


@cache
def quantized(k: int, dtype: str, rows: int = MOST_ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> activations with the extremes of their type, scales, zero points."""
    rng = np.random.default_rng([k, rows])
    info = np.iinfo(dtype)
    a = rng.integers(info.min, info.max, (rows, k), dtype, endpoint=True)
    scales = rng.uniform(0.001, 0.1, rows).astype(np.float32)
    zps = rng.integers(info.min, info.max, rows, np.int32, endpoint=True)
    if rows >= 5:
        a[1], a[2] = info.min, info.max
        zps[1:5] = info.min, info.max, 0, info.max // 2 + 1  # the last is the uint8 value that shifts to 0
    return a, scales, zps


@cache
def floats(k: int, dtype: str = "float32", rows: int = MOST_ROWS) -> np.ndarray:
    rng = np.random.default_rng([k, rows])
    x = rng.standard_normal((rows, k)) * 10.0 ** rng.integers(-3, 3, (rows, 1)) + rng.integers(-1, 2, (rows, 1))
    return x.astype(DTYPES[dtype])


@cache
def expected_gemm(
    weight: Weight, act: str = "uint8", *, bias: bool = False, out: str = "float32", rows: int = MOST_ROWS
) -> np.ndarray:
    a, a_scales, a_zps = quantized(weight.k, act, rows)
    return reference.gemm(
        a,
        **reference_weight(weight),
        a_scales=a_scales,
        a_zps=a_zps,
        bias=bias_of(weight.n) if bias else None,
        group_size=weight.group_size,
        out_dtype=out,
    )


@cache
def expected_linear(
    weight: Weight,
    x: str = "float32",
    *,
    act: str = "uint8",
    bias: bool = False,
    out: str = "float32",
    rows: int = MOST_ROWS,
) -> np.ndarray:
    return reference.linear(
        floats(weight.k, x, rows),
        **reference_weight(weight),
        bias=bias_of(weight.n) if bias else None,
        group_size=weight.group_size,
        act=act,
        out_dtype=out,
    )


def assert_gemm_exact(
    weight: Weight,
    rows: int | tuple[int, int],
    act: str = "uint8",
    *,
    bias: bool = False,
    out: str = "float32",
    most: int = MOST_ROWS,
) -> None:
    """The product of the first rows, or of rows begin to end, equals the oracle's rows."""
    part = slice(*rows) if isinstance(rows, tuple) else slice(rows)
    a, a_scales, a_zps = (array[part] for array in quantized(weight.k, act, most))
    y = pyda8w4.gemm(a, pack(weight), a_scales, a_zps, bias=bias_of(weight.n) if bias else None, out_dtype=DTYPES[out])
    assert y.dtype == DTYPES[out]
    assert_same_bits(y, expected_gemm(weight, act, bias=bias, out=out, rows=most)[part], (weight, act, rows))
