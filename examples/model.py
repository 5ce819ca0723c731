"""Language models in numpy, from a GGUF file: their linear layers and experts are pyda8w4's, the rest is here.

Everything between two linear layers goes row by row (a row is a token). Rows are cut into chunks that fit
the cache and keep all CPUs busy; numpy lets go of the GIL, so plain threads do. One token is one chunk, and
then what counts is the number of numpy calls, a microsecond each: buffers and views of them are made once.

All weights are in memory once, as packed as in the file. That includes the embeddings, of which only the rows
of the tokens that come are made floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

import pyda8w4
import pyda8w4.checkpoints

CHUNK = 64  # rows

# How activations are quantized: of a prompt; of tokens one by one, whose time is that of reading the weights, so that
# 16 bits cost nothing; and of the head, which comes once.
PROMPT_ACT, TOKEN_ACT, HEAD_ACT = "int8_group", "int16", "int16"

Layer = Callable[[np.ndarray, np.ndarray, str], object]  # (x, out, act) -> None


class DA8W4:
    """Matrices that share an input, as one layer; those of one type in the file are one product.

    With an activation they are gates and ups.
    """

    def __init__(self, weights: Weights, names: Sequence[str], activation: str | None = None) -> None:
        runs = [list(run) for _, run in groupby(names, key=lambda name: weights.types[name])]
        parts = [[weights.packed(name) for name in run] for run in runs]
        self.weights = [part[0] if len(part) == 1 else pyda8w4.concat(part) for part in parts]
        self.activation = activation

    def __call__(self, x: np.ndarray, out: np.ndarray, act: str) -> None:
        if len(self.weights) > 1:
            parts = [pyda8w4.linear(x, weight, act=act) for weight in self.weights]
            if self.activation is None:
                np.concatenate(parts, axis=1, out=out)
            else:
                gate(*parts, self.activation, out)
        elif self.activation is None:
            pyda8w4.linear(x, self.weights[0], act=act, out=out)
        else:
            pyda8w4.linear_gated(x, self.weights[0], activation=self.activation, act=act, out=out)


class Mixture:
    """Experts, of which each token has those that the router gives the highest scores."""

    def __init__(self, weights: Weights, prefix: str, chosen: int, activation: str) -> None:
        self.router = weights.array(f"{prefix}ffn_gate_inp").T
        self.gate_up = weights.stack(f"{prefix}ffn_gate_exps", f"{prefix}ffn_up_exps")
        self.down = weights.stack(f"{prefix}ffn_down_exps")
        self.chosen, self.activation = chosen, activation

    def __call__(self, x: np.ndarray, act: str) -> np.ndarray:
        """The experts' results are weighted by the softmax of the scores of those that were chosen.

        A softmax of all scores, of which these are then divided by their sum, is the same.
        """
        scores = x @ self.router
        ids = np.argsort(-scores, axis=1)[:, : self.chosen]
        weights = np.take_along_axis(scores, ids, axis=1)
        weights = np.exp(weights - weights[:, :1])  # the highest comes first
        weights /= weights.sum(axis=1, keepdims=True)
        return pyda8w4.moe(x, self.gate_up, self.down, ids, weights, activation=self.activation, act=act)


class Model:
    """The model and the keys and values of the tokens that it has seen: at most `context`.

    Parameters
    ----------
    file : pyda8w4.checkpoints.Checkpoint
    context : int
    layer : callable
        ``layer(weights, names)`` makes a linear layer of these tensors; with a name of an activation behind them, one
        of gates and ups, which gives ``activation(gate) * up``. It is called with the scheme by which activations are
        quantized. Mixtures of experts are always pyda8w4's.
    act : str
        The scheme of all layers but the head. It may be set at any time.
    """

    def __init__(
        self,
        file: pyda8w4.checkpoints.Checkpoint,
        context: int,
        layer: Callable[..., Layer] = DA8W4,
        act: str = PROMPT_ACT,
    ) -> None:
        name = file.metadata["general.architecture"]
        if name not in ARCHITECTURES:
            raise ValueError(f"file must be of {', '.join(ARCHITECTURES)}, got {name}")
        architecture = ARCHITECTURES[name]

        def field(key: str, default: Any = None) -> Any:
            return file.metadata.get(f"{name}.{key}", default)

        if field("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.types:
            raise ValueError("file must be of a model that does not scale positions, got one that does")
        heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
        hidden, count = field("embedding_length"), field("block_count")
        inner = field("feed_forward_length", 0)  # not that of experts, which pyda8w4 has between its two products
        size = field("attention.key_length", hidden // heads)
        self.shape = (hidden, inner, kv_heads, heads // kv_heads, size)
        self.epsilon = field("attention.layer_norm_rms_epsilon")
        self.scale = np.float32(math.sqrt(hidden) if architecture.scaled else 1)
        self.activation, self.act, self.chosen = architecture.activation, act, field("expert_used_count")
        self.score_cap, self.logit_cap = field("attn_logit_softcapping"), field("final_logit_softcapping")

        weights = Weights(file, size if architecture.halves else 0)
        self.embeddings = weights.embeddings
        self.blocks = [Block(weights, f"blk.{i}.", self, layer) for i in range(count)]
        self.norm = weights.norm("output_norm")
        self.head = layer(weights, ["output" if "output" in weights.types else "token_embd"])

        # Positions turn pairs of neighbours, and such a pair is a complex number. Attention's 1 / sqrt(size) is in
        # here too, half of it for q and half for k. (Gemmas of so many blocks, the 27B, take another size.)
        scale = (hidden // heads if count in (46, 62) else size) ** -0.25

        def turns(base: float) -> np.ndarray:
            angles = np.outer(np.arange(context), base ** (-np.arange(0, size, 2) / size))
            return (scale * np.exp(1j * angles)).astype(np.complex64)[:, None]

        # A block sees all tokens, or those of a window, where positions may turn faster.
        base, window = field("rope.freq_base", 10_000.0), field("attention.sliding_window")
        far, near = (turns(base), None), (turns(field("rope.freq_base_swa", architecture.near_base or base)), window)
        self.sights = [near if (i + 1) % architecture.period else far for i in range(count)]

        # Keys lie transposed, which makes the product with a single query fast. 16 more than the context,
        # which may well be a power of two: rows at such distances fall into the same few lines of the cache.
        self.keys = np.zeros((count, kv_heads, size, context + 16), np.float32)
        self.values = np.zeros((count, kv_heads, context, size), np.float32)
        self.context, self.position = context, 0
        self.buffers = Buffers(1, self)
        self.threads = ThreadPoolExecutor(pyda8w4.get_num_threads())

    def forward(self, tokens: Sequence[int]) -> np.ndarray:
        """Run tokens that follow those seen so far: (M, hidden), valid until the next call.

        Many run in batches of a chunk for every thread, so that buffers stay small.
        """
        most = CHUNK * pyda8w4.get_num_threads()
        if len(tokens) <= most:
            return self.run(tokens)
        hidden = np.empty((len(tokens), self.shape[0]), np.float32)
        for part in np.array_split(np.arange(len(tokens)), -(-len(tokens) // most)):
            hidden[part] = self.run(np.take(tokens, part))
        return hidden

    def run(self, tokens: Sequence[int]) -> np.ndarray:
        if len(self.buffers.x) != len(tokens):
            self.buffers = Buffers(len(tokens), self)
        buffers, position = self.buffers, self.position
        x, y = buffers.x, buffers.y
        np.multiply(self.embeddings.dequantize(tokens), self.scale, out=x)
        self.each(Chunk.normalize, self.blocks[0].attention_norm)
        for i, block in enumerate(self.blocks):
            (turns, window), keys, values = self.sights[i], self.keys[i], self.values[i]
            block.qkv(y, buffers.qkv, self.act)
            self.each(Chunk.remember, block.qk_norm, turns, keys, values, position)
            self.each(Chunk.attend, keys, values, position, window, self.score_cap)
            block.output(buffers.attention, y, self.act)
            self.each(Chunk.add_and_normalize, block.post_attention_norm, block.feed_forward_norm)
            if block.mixture is None:
                block.gate_up(y, buffers.gated, self.act)
                block.down(buffers.gated, y, self.act)
            else:
                np.copyto(y, block.mixture(y, self.act))
            after = self.blocks[i + 1].attention_norm if i + 1 < len(self.blocks) else self.norm
            self.each(Chunk.add_and_normalize, block.post_feed_forward_norm, after)
        self.position += len(tokens)
        return y

    def logits(self, hidden: np.ndarray, out: np.ndarray) -> np.ndarray:
        """What `forward` returns, or rows of it -> (M, vocabulary)."""
        self.head(hidden, out, HEAD_ACT)
        if self.logit_cap is not None:
            cap(out, self.logit_cap)
        return out

    def each(self, step: Callable, *args: object) -> None:
        chunks = self.buffers.chunks
        if len(chunks) == 1:
            step(chunks[0], *args)
        else:
            list(self.threads.map(lambda chunk: step(chunk, *args), chunks))


def generate(model: Model, prompt: list[int], count: int) -> Iterator[int]:
    """The likeliest tokens after `prompt`, one by one."""
    logits = np.empty((1, model.embeddings.shape[0]), np.float32)
    tokens, model.act = prompt, PROMPT_ACT
    for _ in range(count):
        hidden = model.forward(tokens)
        model.act = TOKEN_ACT
        tokens = [int(model.logits(hidden[-1:], logits).argmax())]
        yield tokens[0]


class Weights:
    """The tensors of a file, by name without ".weight".

    Positions turn pairs of q and k. Here they are neighbours; where the file has them in the two halves of heads,
    `halves` is the size of a head, else 0.
    """

    def __init__(self, file: pyda8w4.checkpoints.Checkpoint, halves: int) -> None:
        self.file, self.halves = file, halves
        self.types = {name.removesuffix(".weight"): type for name, type in file.types.items()}
        self.embeddings = file.packed("token_embd.weight")

    def packed(self, name: str) -> pyda8w4.PackedWeight:
        if name == "token_embd":
            return self.embeddings
        if not self.is_in_halves(name):
            return self.file.packed(f"{name}.weight")
        weight = self.file.weight(f"{name}.weight")
        return weight.rows(self.order(weight.shape[0])).pack()

    def stack(self, *names: str) -> pyda8w4.PackedExperts:
        return self.file.stack(*(f"{name}.weight" for name in names))

    def array(self, name: str) -> np.ndarray:
        array = self.file.array(f"{name}.weight")
        return array[self.order(len(array))] if self.is_in_halves(name) else array

    def norm(self, name: str) -> np.ndarray | None:
        """Times sqrt(length): `Norm` divides by the root of the sum of squares, not of their mean."""
        if name not in self.types:
            return None
        weight = self.array(name)
        return weight * np.float32(math.sqrt(len(weight)))

    def is_in_halves(self, name: str) -> bool:
        return self.halves > 0 and name.endswith(("attn_q", "attn_k", "attn_q_norm", "attn_k_norm"))

    def order(self, rows: int) -> np.ndarray:
        return np.arange(rows).reshape(-1, 2, self.halves // 2).transpose(0, 2, 1).reshape(-1)


class Block:
    """Weights of one block. Norms that the model does not have are None."""

    def __init__(self, weights: Weights, prefix: str, model: Model, layer: Callable[..., Layer]) -> None:
        self.qkv = layer(weights, [f"{prefix}attn_{part}" for part in "qkv"])
        self.output = layer(weights, [f"{prefix}attn_output"])
        self.mixture = None
        if f"{prefix}ffn_gate_inp" in weights.types:
            self.mixture = Mixture(weights, prefix, model.chosen, model.activation)
        else:
            self.gate_up = layer(weights, [f"{prefix}ffn_gate", f"{prefix}ffn_up"], model.activation)
            self.down = layer(weights, [f"{prefix}ffn_down"])
        self.attention_norm = weights.norm(f"{prefix}attn_norm")
        self.post_attention_norm = weights.norm(f"{prefix}post_attention_norm")
        self.feed_forward_norm = weights.norm(f"{prefix}ffn_norm")
        self.post_feed_forward_norm = weights.norm(f"{prefix}post_ffw_norm")
        _, _, kv_heads, queries, _ = model.shape
        q, k = (weights.norm(f"{prefix}attn_{part}_norm") for part in "qk")
        self.qk_norm = None if q is None else np.stack([q] * (kv_heads * queries) + [k] * kv_heads)


class Buffers:
    """Inputs and outputs of the linear layers, for M rows."""

    def __init__(self, rows: int, model: Model) -> None:
        hidden, inner, kv_heads, queries, size = model.shape
        heads = kv_heads * queries
        self.x = np.empty((rows, hidden), np.float32)  # what flows from block to block
        self.y = np.empty((rows, hidden), np.float32)  # normalized, and what layers add to x
        self.qkv = np.empty((rows, (heads + 2 * kv_heads) * size), np.float32)
        self.attention = np.empty((rows, heads * size), np.float32)
        self.gated = np.empty((rows, inner), np.float32)
        self.chunks = [Chunk(self, begin, min(begin + CHUNK, rows), model) for begin in range(0, rows, CHUNK)]


class Norm:
    """Divides vectors, the last dimension of `x`, by their root mean square, and multiplies them by a weight."""

    def __init__(self, x: np.ndarray, out: np.ndarray, epsilon: float) -> None:
        self.x, self.out, self.epsilon = x, out, np.float32(epsilon * x.shape[-1])
        self.row, self.column = x[..., None, :], x[..., :, None]
        self.square = np.empty((*x.shape[:-1], 1, 1), np.float32)
        self.length = self.square[..., 0]

    def __call__(self, weight: np.ndarray) -> None:
        np.matmul(self.row, self.column, out=self.square)
        np.add(self.length, self.epsilon, out=self.length)
        np.sqrt(self.length, out=self.length)
        np.divide(self.x, self.length, out=self.out)
        np.multiply(self.out, weight, out=self.out)


class Chunk:
    """Some rows of the buffers, and all that is done to them between linear layers."""

    def __init__(self, buffers: Buffers, begin: int, end: int, model: Model) -> None:
        _, _, kv_heads, queries, size = model.shape
        heads, rows, part = kv_heads * queries, end - begin, slice(begin, end)
        self.begin, self.end = begin, end
        self.x, self.y = buffers.x[part], buffers.y[part]
        self.normalize_x, self.normalize_y = (Norm(each, self.y, model.epsilon) for each in (self.x, self.y))

        # For each key there are several queries. Those of one key lie together, so that they are one product.
        qkv = buffers.qkv[part].reshape(rows, heads + 2 * kv_heads, size)
        qk, v = np.split(qkv, [heads + kv_heads], axis=1)
        self.normalize_qk = Norm(qk, qk, model.epsilon)
        together = np.empty((kv_heads, rows, queries, size), np.float32)
        self.q = together.reshape(kv_heads, rows * queries, size)
        self.q_turned = together.view(np.complex64).transpose(1, 0, 2, 3)
        self.q_pairs = qk[:, :heads].view(np.complex64).reshape(self.q_turned.shape)
        self.k_pairs = qk[:, heads:].view(np.complex64)
        self.k, self.v = qk[:, heads:].transpose(1, 2, 0), v.transpose(1, 0, 2)
        self.scores = np.empty(self.q.shape[0] * self.q.shape[1] * model.context, np.float32)
        self.highest = np.empty((*self.q.shape[:2], 1), np.float32)
        self.mixed = np.empty(self.q.shape, np.float32)
        self.attention = buffers.attention[part].reshape(rows, kv_heads, queries, size).transpose(1, 0, 2, 3)
        never = np.full((rows, rows), -np.inf, np.float32)
        self.future, self.past = (np.repeat(each, queries, axis=0) for each in (np.triu(never, 1), np.tril(never, -1)))

    def normalize(self, weight: np.ndarray) -> None:
        self.normalize_x(weight)

    def add_and_normalize(self, post: np.ndarray | None, weight: np.ndarray) -> None:
        if post is not None:
            self.normalize_y(post)
        np.add(self.x, self.y, out=self.x)
        self.normalize_x(weight)

    def remember(
        self, weight: np.ndarray | None, turns: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int
    ) -> None:
        if weight is not None:
            self.normalize_qk(weight)
        part = slice(position + self.begin, position + self.end)
        turn = turns[part]
        np.multiply(self.q_pairs, turn[:, :, None], out=self.q_turned)
        np.multiply(self.k_pairs, turn, out=self.k_pairs)
        keys[:, :, part] = self.k
        values[:, part] = self.v

    def attend(
        self, keys: np.ndarray, values: np.ndarray, position: int, window: int | None, score_cap: float | None
    ) -> None:
        kv_heads, rows, _ = self.q.shape
        here, end, count = position + self.begin, position + self.end, self.end - self.begin
        first = 0 if window is None else here + 1 - window  # what the first row sees, where there is so much
        begin = max(0, first)
        scores = self.scores[: kv_heads * rows * (end - begin)].reshape(kv_heads, rows, end - begin)
        np.matmul(self.q, keys[:, :, begin:end], out=scores)
        if score_cap is not None:
            cap(scores, score_cap)
        if count > 1:
            scores[:, :, here - begin :] += self.future
            if window is not None and (missing := begin - first) < count:
                scores[:, :, : count - missing] += self.past[:, missing:]
        np.maximum.reduce(scores, axis=2, keepdims=True, out=self.highest)
        np.subtract(scores, self.highest, out=scores)
        np.exp(scores, out=scores)
        np.add.reduce(scores, axis=2, keepdims=True, out=self.highest)
        np.matmul(scores, values[:, begin:end], out=self.mixed)
        np.divide(self.mixed, self.highest, out=self.mixed)
        self.attention[...] = self.mixed.reshape(self.attention.shape)


def gate(gates: np.ndarray, ups: np.ndarray, activation: str, out: np.ndarray) -> None:
    """`activation(gate) * up`, where gates and ups are not one product of pyda8w4.

    SiLU is gate * sigmoid(gate). GELU by tanh is the same with sigmoid(2 u), which is (1 + tanh(u)) / 2, where
    u = sqrt(2 / pi) * (gate + 0.044715 gate^3).
    """
    if activation == "silu":
        np.negative(gates, out=out)
    else:
        np.multiply(gates, gates, out=out)
        np.multiply(out, np.float32(-2 * math.sqrt(2 / math.pi) * 0.044715), out=out)
        np.add(out, np.float32(-2 * math.sqrt(2 / math.pi)), out=out)
        np.multiply(out, gates, out=out)
    with np.errstate(over="ignore"):  # an infinite exponential makes 0 of the gate, as it should
        np.exp(out, out=out)
    np.add(out, np.float32(1), out=out)
    np.divide(gates, out, out=out)
    np.multiply(out, ups, out=out)


def cap(x: np.ndarray, most: float) -> None:
    """Limit absolute values, smoothly."""
    np.divide(x, np.float32(most), out=x)
    np.tanh(x, out=x)
    np.multiply(x, np.float32(most), out=x)


@dataclass(frozen=True)
class Architecture:
    """What files do not say of a model: all that neither metadata nor the names of tensors tell."""

    activation: str = "silu"
    halves: bool = False  # whether pairs that positions turn are in two halves of a head, or neighbours
    scaled: bool = False  # whether embeddings are multiplied by sqrt(hidden)
    period: int = 1  # Of so many blocks the last sees all tokens, others those of a window,
    near_base: float | None = None  # where positions turn by this base


ARCHITECTURES = {
    "llama": Architecture(),
    "gemma2": Architecture("gelu_tanh", halves=True, scaled=True, period=2),
    "gemma3": Architecture("gelu_tanh", halves=True, scaled=True, period=6, near_base=10_000.0),
    "qwen3moe": Architecture(halves=True),
}
