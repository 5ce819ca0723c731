"""What a library whose mixture of experts is timed has to say and do, and the experts that all of them get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from peers import Layer, Peer, exact_product

Call = Callable[[], Any]
MIXTURES: dict[str, type[Mixture]] = {}
ALPHA, LIMIT = 1.702, 7.0  # of swigluoai, as gpt-oss has them


@dataclass(frozen=True)
class Shape:
    """A layer of experts, of which each token takes `top`."""

    experts: int
    top: int
    k: int  # features of a token, and of the output
    i: int  # features between the two products of an expert
    activation: str = "silu"  # or swigluoai, as gpt-oss has it: with biases, and rows of gate and up by turns

    @property
    def interleaved(self) -> bool:
        return self.activation == "swigluoai"

    @property
    def biased(self) -> bool:
        return self.activation == "swigluoai"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of gate, up and down."""
        return (self.i, self.k), (self.i, self.k), (self.k, self.i)

    @property
    def expert_size(self) -> int:
        """Weights of one expert."""
        return 3 * self.i * self.k

    def __str__(self) -> str:
        return f"{self.top} of {self.experts} experts, K = {self.k}, I = {self.i}, {self.activation}"


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, "swigluoai"),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
}


@dataclass(frozen=True)
class Experts:
    """Random experts in several layers. All of them have the same rows, each in an order of its own, so that no library
    can take two for one, and yet a library quantizes them once."""

    shape: Shape
    group_size: int
    gate: Layer  # (I, K), of expert 0 of layer 0
    up: Layer  # (I, K)
    down: Layer  # (K, I)
    gate_bias: np.ndarray | None  # (E, I) float32, exact in bfloat16; the same in all layers
    up_bias: np.ndarray | None  # (E, I)
    down_bias: np.ndarray | None  # (E, K)

    @classmethod
    def random(cls, shape: Shape, group_size: int) -> Experts:
        rng = np.random.default_rng(0)
        parts = [Layer.random(n, k, min(group_size, k), seed) for seed, (n, k) in enumerate(shape.sizes)]
        biases = [
            rng.integers(-128, 128, (shape.experts, n)).astype(np.float32) / 64 if shape.biased else None
            for n, _ in shape.sizes
        ]
        return cls(shape, group_size, *parts, *biases)

    def order(self, layer: int, expert: int) -> int:
        """By how many rows the parts of this expert are rolled."""
        return layer * self.shape.experts + expert

    def orders(self, layer: int) -> Iterator[int]:
        return (self.order(layer, expert) for expert in range(self.shape.experts))

    def gate_up(self, order: int, *, interleaved: bool) -> Layer:
        """The first product of an expert as one layer: the rows of gate and then those of up, or by turns."""
        gate, up = self.gate.rolled(order), self.up.rolled(order)
        pairs = (gate.codes, up.codes), (gate.scales, up.scales), (gate.zps, up.zps)
        return Layer(*(_join(*pair, axis=0, interleaved=interleaved) for pair in pairs), gate.group_size)

    def gate_up_bias(self, *, interleaved: bool) -> np.ndarray | None:
        """In the same order, (E, 2 * I)."""
        if self.gate_bias is None or self.up_bias is None:
            return None
        return _join(self.gate_bias, self.up_bias, axis=1, interleaved=interleaved)

    def exact(
        self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray
    ) -> np.ndarray:
        """What the experts of layer 0 give, (M, K) float64, where these are the weights of the first of them."""
        tokens, slots = ids.shape
        of_token = np.repeat(np.arange(tokens), slots)
        g, u = (_rolled(exact_product(x, w)[of_token], ids.reshape(-1)) for w in (gate, up))
        if self.gate_bias is not None and self.up_bias is not None:
            g, u = g + self.gate_bias[ids.reshape(-1)], u + self.up_bias[ids.reshape(-1)]
        y = _rolled(exact_product(_gated(g, u, self.shape.activation), down), ids.reshape(-1))
        if self.down_bias is not None:
            y += self.down_bias[ids.reshape(-1)]
        return (y.reshape(tokens, slots, -1) * weights[:, :, None]).sum(axis=1)


def stacked(parts: Iterable[Layer], convert: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes, each part's converted, and scales (E, N, G); of the parts, one at a time is in memory."""
    codes, scales = zip(*((convert(part.codes), part.scales) for part in parts))
    return np.stack(codes), np.stack(scales)


def _join(gate: np.ndarray, up: np.ndarray, *, axis: int, interleaved: bool) -> np.ndarray:
    if not interleaved:
        return np.concatenate([gate, up], axis=axis)
    pairs = np.stack([gate, up], axis=axis + 1)
    return pairs.reshape(*gate.shape[:axis], -1, *gate.shape[axis + 1 :])


def _rolled(rows: np.ndarray, orders: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(row, order) for row, order in zip(rows, orders)])


def _gated(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    return gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)


@dataclass(frozen=True)
class Routing:
    """Which experts tokens take, in calls that alternate between layers."""

    calls: list[tuple[int, np.ndarray]]  # a layer, and ids (M, top) int32
    weights: np.ndarray  # (M, top) float32; those of a token add up to 1
    chosen: int  # how many experts a call multiplies by


def routing(shape: Shape, m: int, layers: int) -> Routing:
    """Let each of m tokens take random experts.

    From one call of a layer to the next, experts only change their names. So all calls make equal products, and all
    experts of a layer come before one is read again, as far as there are enough.
    """
    rng = np.random.default_rng(m)
    taken = np.argsort(rng.random((m, shape.experts)), axis=1)[:, : shape.top]
    chosen, names = np.unique(taken, return_inverse=True)
    names = names.reshape(taken.shape)
    order = rng.permutation(shape.experts).astype(np.int32)
    weights = np.exp(rng.standard_normal(taken.shape))
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    starts = range(0, shape.experts, len(chosen))
    calls = [(layer, order[(names + start) % shape.experts]) for start in starts for layer in range(layers)]
    return Routing(calls, weights, len(chosen))


class Mixture(ABC):
    """A library with layers of experts in memory. A subclass that has a `name` is entered in MIXTURES.

    Parameters
    ----------
    experts : Experts
    layers : int
    threads : int
    """

    name: ClassVar[str]
    about: ClassVar[str]
    like: ClassVar[type[Peer]]  # the same library with the same format of weights
    by_default: ClassVar[bool] = True  # Whether it runs without being named.

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            MIXTURES[cls.name] = cls

    def __init__(self, experts: Experts, layers: int, threads: int) -> None:
        self.experts, self.shape, self.layers, self.threads = experts, experts.shape, layers, threads
        self.build()

    @classmethod
    def missing(cls) -> str | None:
        """Why this library cannot run here; None if it can."""
        return cls.like.missing()

    @classmethod
    def versions(cls) -> dict[str, str]:
        return cls.like.versions()

    @classmethod
    def refuses(cls, shape: Shape, group_size: int) -> str | None:
        """Why it cannot take these experts."""
        reasons = [cls.like.refuses(part) for part in _parts(shape, group_size)]
        return next(filter(None, reasons), None)

    @classmethod
    def expert_bytes(cls, shape: Shape, group_size: int) -> int:
        """Bytes of weight of one expert, as the format needs them."""
        return sum(cls.like.weight_bytes(part) for part in _parts(shape, group_size))

    @abstractmethod
    def build(self) -> None:
        """Make the layers."""

    @abstractmethod
    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        """Functions of x, one for each layer and ids of `calls`, which are what `routing` returns."""

    def result(self, returned: Any) -> np.ndarray:
        """The (M, K) output as an array; `returned` is what a function returned."""
        return returned

    def dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The float32 weights of gate, up and down that the first expert stands for."""
        experts = self.experts
        return experts.gate.dense(), experts.up.dense(), experts.down.dense()


def _parts(shape: Shape, group_size: int) -> Iterator[Layer]:
    """Layers of the sizes of gate, up and down, of memory that nothing touches."""
    for n, k in shape.sizes:
        group = min(group_size, k)
        groups = -(-k // group)
        yield Layer(
            np.empty((n, k), np.uint8), np.empty((n, groups), np.float32), np.empty((n, groups), np.uint8), group
        )
