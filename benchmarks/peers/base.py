"""What a library whose linear layer is timed has to say and do."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Call = Callable[[], Any]
PEERS: dict[str, type[Peer]] = {}


@dataclass(frozen=True)
class Layer:
    """A random layer: w[n, k] = (codes[n, k] - zps[n, g]) * scales[n, g], g = k // group_size."""

    codes: np.ndarray  # (N, K) uint8, 0..15
    scales: np.ndarray  # (N, G) float32, each exact in float16
    zps: np.ndarray  # (N, G) uint8
    group_size: int

    @classmethod
    def random(cls, n: int, k: int, group_size: int, seed: int = 0) -> Layer:
        rng = np.random.default_rng(seed)
        groups = -(-k // group_size)
        scales = (rng.uniform(0.5, 1.5, (n, groups)) / np.sqrt(k)).astype(np.float16).astype(np.float32)
        codes = rng.integers(0, 16, (n, k), np.uint8)
        return cls(codes, scales, rng.integers(6, 11, (n, groups), np.uint8), group_size)

    def rolled(self, rows: int) -> Layer:
        """A layer of the same rows in another order, so that no library can take two copies for one."""
        codes, scales, zps = (np.roll(part, rows, axis=0) for part in (self.codes, self.scales, self.zps))
        return Layer(codes, scales, zps, self.group_size)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dense(self, *, symmetric: bool = False) -> np.ndarray:
        """The exact weights, (N, K) float32; where `symmetric`, as if every zero point were 8."""
        zps = np.full_like(self.zps, 8) if symmetric else self.zps
        scales, zps = (np.repeat(part, self.group_size, axis=1)[:, : self.shape[1]] for part in (self.scales, zps))
        return np.subtract(self.codes, zps, dtype=np.float32) * scales


def exact_product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T in float64, in parts: w in float64 would take much memory."""
    x = x.astype(np.float64)
    return np.concatenate([x @ w[n : n + 1024].T for n in range(0, len(w), 1024)], axis=1)


def relative_error(y: np.ndarray, exact: np.ndarray) -> float:
    """norm(y - exact) / norm(exact)."""
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack two codes a byte along the last axis, the first in the low half; an odd end is filled with 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | codes[..., 1::2] << 4


def eight_bits(layer: Layer, *, per_column: bool) -> tuple[np.ndarray, np.ndarray]:
    """The layer with 8 bits: codes (N, K) int8 and scales float32, (N, G) or, if `per_column`, (N, 1)."""
    n, k = layer.shape
    group = k if per_column else layer.group_size
    w = layer.dense().reshape(n, k // group, group)
    scales = np.abs(w).max(axis=2, keepdims=True) / np.float32(127)
    return np.rint(w / scales).astype(np.int8).reshape(n, k), scales[:, :, 0]


def eight_bits_dense(layer: Layer, *, per_column: bool) -> np.ndarray:
    """What those stand for, (N, K) float32."""
    codes, scales = eight_bits(layer, per_column=per_column)
    return codes * np.repeat(scales, layer.shape[1] // scales.shape[1], axis=1)


class Peer(ABC):
    """A library with `copies` of one layer in memory. A subclass that has a `name` is entered in PEERS.

    Parameters
    ----------
    layer : Layer
    copies : int
        Copy i is ``layer.rolled(i)``.
    threads : int
    """

    name: ClassVar[str]
    about: ClassVar[str]
    packages: ClassVar[Sequence[str]]  # The distributions that it needs; their versions are reported.
    by_default: ClassVar[bool] = True  # Whether it runs without being named.
    per_pass: ClassVar[bool] = False  # One call multiplies by every copy, because graphs cost less run as a whole.

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            PEERS[cls.name] = cls

    def __init__(self, layer: Layer, copies: int, threads: int) -> None:
        self.layer, self.copies, self.threads = layer, copies, threads
        self.build()

    @classmethod
    def missing(cls) -> str | None:
        """Why this library cannot run here; None if it can."""
        for package in cls.packages:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return f"{package} is not installed"
        return cls.lacks()

    @classmethod
    def lacks(cls) -> str | None:
        """What the machine or the installed packages lack."""
        return None

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        """Why it cannot take this layer."""
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {package: importlib.metadata.version(package) for package in cls.packages}

    @classmethod
    @abstractmethod
    def weight_bytes(cls, layer: Layer) -> int:
        """Bytes of weight that one product reads, as the format needs them."""

    @abstractmethod
    def build(self) -> None:
        """Make the copies."""

    @abstractmethod
    def bind(self, x: np.ndarray) -> Sequence[Call]:
        """Functions that multiply x, one for each copy; where `per_pass`, a single one for all copies."""

    def result(self, returned: Any) -> np.ndarray:
        """The product by the first copy as an array; `returned` is what the first function returned."""
        return returned

    def dense(self) -> np.ndarray:
        """The (N, K) weights that the first copy stands for."""
        return self.layer.dense()

    def layers(self) -> Iterator[Layer]:
        """The layers to make the copies from, one at a time."""
        return (self.layer.rolled(copy) for copy in range(self.copies))


def four_bits(layer: Layer, *, scale: int, zero_point: float) -> int:
    """Count the bytes of 4-bit codes with `scale` and `zero_point` bytes a group."""
    return int(layer.codes.size / 2 + layer.scales.size * (scale + zero_point))
