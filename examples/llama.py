"""A Llama in numpy, from a GGUF file: its linear layers are pyda8w4's, the rest is here.

Everything between two linear layers goes row by row (a row is a token). Rows are cut into chunks that fit
the cache and keep all CPUs busy; numpy lets go of the GIL, so plain threads do. One token is one chunk, and
then what counts is the number of numpy calls, a microsecond each: buffers and views of them are made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np

import pyda8w4
import pyda8w4.checkpoints

CHUNK = 64  # rows

Layer = Callable[[np.ndarray, np.ndarray], object]  # (x, out) -> None


class DA8W4:
    """Matrices that share an input, as one layer; those of one type in the file are one product."""

    def __init__(self, file: pyda8w4.checkpoints.Checkpoint, names: Sequence[str], act: str = "uint8") -> None:
        tensors = [f"{name}.weight" for name in names]
        runs = [list(run) for _, run in groupby(tensors, key=lambda tensor: file.types[tensor])]
        self.weights = [pyda8w4.concat([file.packed(tensor) for tensor in run]) for run in runs]
        self.act = act

    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        if len(self.weights) == 1:
            pyda8w4.linear(x, self.weights[0], act=self.act, out=out)
            return
        end = 0
        for weight in self.weights:
            begin, end = end, end + weight.shape[0]
            out[:, begin:end] = pyda8w4.linear(x, weight, act=self.act)


class Llama:
    """The model and the keys and values of the tokens that it has seen: at most `context`.

    Parameters
    ----------
    file : pyda8w4.checkpoints.Checkpoint
    context : int
    layer : callable
        ``layer(file, names)`` makes a linear layer, ``layer(file, names, act="int16")`` the head: what it adds to
        the error comes last, and its activations cost little beside its weights.
    """

    def __init__(self, file: pyda8w4.checkpoints.Checkpoint, context: int, layer: Callable[..., Layer] = DA8W4) -> None:
        def field(name: str):
            return file.metadata[f"llama.{name}"]

        heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
        hidden, inner = field("embedding_length"), field("feed_forward_length")
        size = hidden // heads
        self.shape = (hidden, inner, kv_heads, heads // kv_heads, size)
        self.epsilon = np.float32(field("attention.layer_norm_rms_epsilon") * hidden)
        self.embeddings = file.array("token_embd.weight")
        self.blocks = [Block(file, f"blk.{i}.", layer) for i in range(field("block_count"))]
        self.norm = norm_weight(file, "output_norm")
        self.head = layer(file, ["output" if "output.weight" in file.types else "token_embd"], act="int16")

        # Positions turn pairs of neighbours: GGUF orders the rows of q and k so, and such a pair is a complex
        # number. Attention's 1 / sqrt(size) is in here too, half of it for q and half for k.
        angles = np.outer(np.arange(context), field("rope.freq_base") ** (-np.arange(0, size, 2) / size))
        self.turns = (size**-0.25 * np.exp(1j * angles)).astype(np.complex64)[:, None]

        # Keys lie transposed, which makes the product with a single query fast. 16 more than the context,
        # which may well be a power of two: rows at such distances fall into the same few lines of the cache.
        self.keys = np.zeros((len(self.blocks), kv_heads, size, context + 16), np.float32)
        self.values = np.zeros((len(self.blocks), kv_heads, context, size), np.float32)
        self.position = 0
        self.buffers: dict[int, Buffers] = {}
        self.threads = ThreadPoolExecutor(pyda8w4.get_num_threads())

    def forward(self, tokens: Sequence[int]) -> np.ndarray:
        """Run tokens that follow those seen so far: (M, hidden), valid until the next call."""
        buffers = self.buffers.get(len(tokens)) or self.buffers.setdefault(len(tokens), Buffers(len(tokens), self))
        x, y = buffers.x, buffers.y
        np.take(self.embeddings, tokens, axis=0, out=x, mode="clip")
        self.each(buffers, Chunk.normalize, self.blocks[0].attention_norm)
        for i, block in enumerate(self.blocks):
            block.qkv(y, buffers.qkv)
            self.each(buffers, Chunk.remember, self.turns, self.keys[i], self.values[i], self.position)
            self.each(buffers, Chunk.attend, self.keys[i], self.values[i], self.position)
            block.output(buffers.attention, y)
            self.each(buffers, Chunk.add_and_normalize, block.feed_forward_norm)
            block.gate_up(y, buffers.gate_up)
            self.each(buffers, Chunk.gate)
            block.down(buffers.gated, y)
            after = self.blocks[i + 1].attention_norm if i + 1 < len(self.blocks) else self.norm
            self.each(buffers, Chunk.add_and_normalize, after)
        self.position += len(tokens)
        return y

    def logits(self, hidden: np.ndarray, out: np.ndarray) -> np.ndarray:
        """What `forward` returns, or rows of it -> (M, vocabulary)."""
        self.head(hidden, out)
        return out

    def each(self, buffers: Buffers, step: Callable, *args: object) -> None:
        if len(buffers.chunks) == 1:
            step(buffers.chunks[0], *args)
        else:
            list(self.threads.map(lambda chunk: step(chunk, *args), buffers.chunks))


class Block:
    """Weights of one block."""

    def __init__(self, file: pyda8w4.checkpoints.Checkpoint, prefix: str, layer: Callable[..., Layer]) -> None:
        self.qkv = layer(file, [f"{prefix}attn_{part}" for part in "qkv"])
        self.output = layer(file, [f"{prefix}attn_output"])
        self.gate_up = layer(file, [f"{prefix}ffn_gate", f"{prefix}ffn_up"])
        self.down = layer(file, [f"{prefix}ffn_down"])
        self.attention_norm = norm_weight(file, f"{prefix}attn_norm")
        self.feed_forward_norm = norm_weight(file, f"{prefix}ffn_norm")


def norm_weight(file: pyda8w4.checkpoints.Checkpoint, name: str) -> np.ndarray:
    """Times sqrt(hidden): `normalize` divides by the root of the sum of squares, not of their mean."""
    weight = file.array(f"{name}.weight")
    return weight * np.float32(math.sqrt(len(weight)))


class Buffers:
    """Inputs and outputs of the linear layers, for M rows."""

    def __init__(self, rows: int, model: Llama) -> None:
        hidden, inner, kv_heads, queries, size = model.shape
        heads = kv_heads * queries
        self.x = np.empty((rows, hidden), np.float32)  # what flows from block to block
        self.y = np.empty((rows, hidden), np.float32)  # normalized, and what layers add to x
        self.qkv = np.empty((rows, (heads + 2 * kv_heads) * size), np.float32)
        self.attention = np.empty((rows, hidden), np.float32)
        self.gate_up = np.empty((rows, 2 * inner), np.float32)
        self.gated = np.empty((rows, inner), np.float32)
        self.chunks = [Chunk(self, begin, min(begin + CHUNK, rows), model) for begin in range(0, rows, CHUNK)]


class Chunk:
    """Some rows of the buffers, and all that is done to them between linear layers."""

    def __init__(self, buffers: Buffers, begin: int, end: int, model: Llama) -> None:
        _, inner, kv_heads, queries, size = model.shape
        rows, part = end - begin, slice(begin, end)
        self.begin, self.end, self.epsilon = begin, end, model.epsilon
        self.x, self.y = buffers.x[part], buffers.y[part]
        self.x_row, self.x_column = self.x[:, None, :], self.x[:, :, None]
        self.square = np.empty((rows, 1, 1), np.float32)
        self.length = self.square[:, :, 0]

        # For each key there are several queries. Those of one key lie together, so that they are one product.
        q, k, v = np.split(buffers.qkv[part], np.cumsum([kv_heads * queries * size, kv_heads * size]), axis=1)
        together = np.empty((kv_heads, rows, queries, size), np.float32)
        self.q = together.reshape(kv_heads, rows * queries, size)
        self.q_turned = together.view(np.complex64).transpose(1, 0, 2, 3)
        self.q_pairs = q.view(np.complex64).reshape(self.q_turned.shape)
        self.k_pairs = k.view(np.complex64).reshape(rows, kv_heads, size // 2)
        self.k = k.reshape(rows, kv_heads, size).transpose(1, 2, 0)
        self.v = v.reshape(rows, kv_heads, size).transpose(1, 0, 2)
        self.scores = np.empty(self.q.shape[0] * self.q.shape[1] * model.turns.shape[0], np.float32)
        self.highest = np.empty((*self.q.shape[:2], 1), np.float32)
        self.mixed = np.empty(self.q.shape, np.float32)
        self.attention = buffers.attention[part].reshape(rows, kv_heads, queries, size).transpose(1, 0, 2, 3)
        self.future = np.repeat(np.triu(np.full((rows, rows), -np.inf, np.float32), 1), queries, axis=0)

        self.gates, self.ups = buffers.gate_up[part, :inner], buffers.gate_up[part, inner:]
        self.gated = buffers.gated[part]

    def normalize(self, weight: np.ndarray) -> None:
        np.matmul(self.x_row, self.x_column, out=self.square)
        np.add(self.length, self.epsilon, out=self.length)
        np.sqrt(self.length, out=self.length)
        np.divide(self.x, self.length, out=self.y)
        np.multiply(self.y, weight, out=self.y)

    def add_and_normalize(self, weight: np.ndarray) -> None:
        np.add(self.x, self.y, out=self.x)
        self.normalize(weight)

    def remember(self, turns: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int) -> None:
        part = slice(position + self.begin, position + self.end)
        turn = turns[part]
        np.multiply(self.q_pairs, turn[:, :, None], out=self.q_turned)
        np.multiply(self.k_pairs, turn, out=self.k_pairs)
        keys[:, :, part] = self.k
        values[:, part] = self.v

    def attend(self, keys: np.ndarray, values: np.ndarray, position: int) -> None:
        end = position + self.end
        kv_heads, rows, _ = self.q.shape
        scores = self.scores[: kv_heads * rows * end].reshape(kv_heads, rows, end)
        np.matmul(self.q, keys[:, :, :end], out=scores)
        if self.end - self.begin > 1:
            scores[:, :, position + self.begin :] += self.future
        np.maximum.reduce(scores, axis=2, keepdims=True, out=self.highest)
        np.subtract(scores, self.highest, out=scores)
        np.exp(scores, out=scores)
        np.add.reduce(scores, axis=2, keepdims=True, out=self.highest)
        np.matmul(scores, values[:, :end], out=self.mixed)
        np.divide(self.mixed, self.highest, out=self.mixed)
        self.attention[...] = self.mixed.reshape(self.attention.shape)

    def gate(self) -> None:
        """gate * sigmoid(gate) * up"""
        np.negative(self.gates, out=self.gated)
        np.exp(self.gated, out=self.gated)
        np.add(self.gated, np.float32(1), out=self.gated)
        np.divide(self.gates, self.gated, out=self.gated)
        np.multiply(self.gated, self.ups, out=self.gated)
