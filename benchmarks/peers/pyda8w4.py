"""This library: `pyda8w4.linear` with weights of every kind and activations of every scheme, also with kernels that it
would not choose, and the torch adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np

from .base import Call, Layer, Peer, four_bits
from .torch_base import TorchPeer


@dataclass(frozen=True)
class Kind:
    """What a packed weight is made of."""

    about: str
    bits: int = 4
    group_size: int | None = None  # None: that of the layer
    zero_points: bool = False  # one for each group
    super_size: int = 0  # groups of a super-group; 0: scales of one level
    sub_type: type[np.integer] = np.uint8
    offsets: bool = False
    table: tuple[int, ...] | None = None

    def groups(self, layer: Layer) -> tuple[int, int]:
        """Groups of a row, and how many scales they have."""
        groups = -(-layer.shape[1] // (self.group_size or layer.group_size))
        return groups, -(-groups // self.super_size) if self.super_size else groups

    def weight_bytes(self, layer: Layer) -> int:
        """Bytes of codes, scales, zero points and offsets."""
        groups, scales = self.groups(layer)
        floats = 2 * scales * (1 + self.offsets)
        small = groups * (self.zero_points + bool(self.super_size) * (1 + self.offsets))
        return layer.codes.size * self.bits // 8 + layer.shape[0] * (floats + small)

    def random(self, layer: Layer) -> dict[str, Any]:
        """Arguments of prepack, of the layer's shape; random, but for the plain kind, whose are the layer's."""
        if self is KINDS[""]:
            return {"codes": layer.codes, "scales": layer.scales, "zps": layer.zps}
        (n, k), (groups, scales) = layer.shape, self.groups(layer)
        rng, middle = np.random.default_rng(0), 1 << self.bits - 1
        least, dtype = (-middle, np.int8) if self.bits == 8 else (0, np.uint8)
        sub = {np.uint8: (32, 64), np.int8: (-64, 64)}[self.sub_type]
        unit = 8 / middle / np.sqrt(k) / (48 if self.super_size else 1)  # weights of one size, whatever the kind
        arrays: dict[str, Any] = {
            "codes": rng.integers(least, least + 2 * middle, (n, k), dtype),
            "scales": (unit * rng.uniform(0.5, 1.5, (n, scales))).astype(np.float16),
        }
        if self.super_size:
            arrays["sub_scales"] = rng.integers(*sub, (n, groups), self.sub_type)
        if self.zero_points:
            arrays["zps"] = rng.integers(middle - 2, middle + 3, (n, groups), np.uint8)
        if self.offsets:
            arrays["zps"] = np.zeros((n, groups), np.uint8)
            arrays["offsets"] = (-middle * arrays["scales"]).astype(np.float16)
        if self.offsets and self.super_size:
            arrays["sub_offsets"] = rng.integers(*sub, (n, groups), self.sub_type)
        return arrays


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Peers are named pyda8w4-KIND:SCHEME. Those of GGUF have its groups whatever those of the layer are.
KINDS = {
    "": Kind("4 bits, zero points", zero_points=True),
    "offsets": Kind("4 bits, offsets", offsets=True),
    "q4_k": Kind("4 bits, groups of 32, scales and offsets of two levels", 4, 32, super_size=8, offsets=True),
    "q5_k": Kind("5 bits, groups of 32, scales and offsets of two levels", 5, 32, super_size=8, offsets=True),
    "q6_k": Kind("6 bits, groups of 16, scales of two levels", 6, 16, super_size=16, sub_type=np.int8),
    "table": Kind("4 bits, a table of 16 values", table=_IQ4),
    "int5": Kind("5 bits, zero points", 5, zero_points=True),
    "int6": Kind("6 bits, zero points", 6, zero_points=True),
    "int8": Kind("8 bits", 8),
}
SCHEMES = ("uint8", "int8", "int8_group", "int16")


class Pyda8w4(Peer):
    packages = ("pyda8w4",)
    kind: ClassVar[Kind] = KINDS[""]
    act: ClassVar[str] = "uint8"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return cls.kind.weight_bytes(layer)

    @classmethod
    def versions(cls) -> dict[str, str]:
        import pyda8w4

        return {**super().versions(), "kernel": pyda8w4.cpu_info()["kernel"]}

    def build(self) -> None:
        import pyda8w4

        pyda8w4.set_num_threads(self.threads)
        arrays, kind = self.kind.random(self.layer), self.kind
        # Those that compare_commits.py compares may be older than kinds of weights.
        more = {} if kind is KINDS[""] else {"bits": kind.bits, "table": kind.table}
        size = kind.group_size or self.layer.group_size
        rolled = ([np.roll(array, copy, axis=0) for array in arrays.values()] for copy in range(self.copies))
        self.packed = [
            pyda8w4.prepack(codes, scales, **dict(zip(list(arrays)[2:], rest)), group_size=size, **more)
            for codes, scales, *rest in rolled
        ]

    def bind(self, x: np.ndarray) -> list[Call]:
        return self.calls(x, self.act)

    def calls(self, x: np.ndarray, act: str) -> list[Call]:
        """The same weights may be multiplied with activations of several schemes."""
        from pyda8w4 import linear

        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        more = {} if act == "uint8" else {"act": act}
        return [partial(linear, x, packed, out=out, **more) for packed in self.packed]

    def dense(self) -> np.ndarray:
        return self.layer.dense() if self.kind is KINDS[""] else self.packed[0].dequantize()


for _kind, _act in product(KINDS, SCHEMES):
    _name = "pyda8w4" + f"-{_kind}" * bool(_kind) + f":{_act}" * (_act != "uint8")
    _about = "the kernel that it chooses" + f"; {KINDS[_kind].about}" * bool(_kind) + f"; {_act}" * (_act != "uint8")
    _attributes = {"name": _name, "about": _about, "kind": KINDS[_kind], "act": _act}
    type(_name, (Pyda8w4,), {**_attributes, "by_default": _name == "pyda8w4"})


class _Forced(Pyda8w4):
    kernel: ClassVar[str]

    @classmethod
    def lacks(cls) -> str | None:
        import pyda8w4

        return None if cls.kernel in pyda8w4.kernels() else f"this CPU or build lacks the kernel {cls.kernel}"

    def build(self) -> None:
        os.environ["PYDA8W4_KERNEL"] = self.kernel  # The library reads this at its first call.
        super().build()


for _kernel in ("avx512vnni", "avxvnni", "avx2", "scalar"):
    _attributes = {"name": f"pyda8w4-{_kernel}", "about": f"kernel {_kernel}", "kernel": _kernel}
    type(_kernel, (_Forced,), {**_attributes, "by_default": _kernel == "avx2"})


class Module(TorchPeer):
    name = "pyda8w4-torch"
    about = "pyda8w4.torch.DA8W4Linear, bfloat16 in and out"
    by_default = False
    packages = ("pyda8w4", "torch")

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=1)

    def pack(self, layer: Layer) -> Any:
        from pyda8w4.torch import DA8W4Linear

        parts = (self.torch.from_numpy(part) for part in (layer.codes, layer.scales, layer.zps))
        return DA8W4Linear.from_int4(*parts, group_size=layer.group_size)

    def multiply(self, x: Any, weight: Any) -> Any:
        return weight(x)
