"""How far a language model with other weights or activations is from the same model in float32.

All that is compared runs in one examples/model.py, of which the linear layers but the head are exchanged: the head,
whose activations are int16, is part of the reference, too. (With a float32 head the loss of a window differed by less
than 0.0001, and the divergence by 0.0000001.) Windows of tokens are the outer loop, because the logits of one are all
that fits memory: 268 MB of Gemma 3.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, LlamaFileType
from model import DA8W4, PROMPT_ACT, Layer, Model, Weights, gate
from quality_tables import Row, Table, mean_and_error
from quantizers import GROUPS, QUANTIZERS, RECOMMENDED, signal_to_noise
from tokenization import adds_bos, make_tokenizer

import pyda8w4
import pyda8w4.checkpoints

WINDOW = 512
FLOAT = "float32"  # the activations of layers that quantize none

Predict = Callable[[np.ndarray], np.ndarray]  # a window of tokens -> logits after each of its second half

SIZES = {"weights": "", "groups of": "d", "activations": "", "bits": ".2f", "SQNR, dB": ".2f"}
SCORES = {"perplexity": ".3f", "over float32, %": ".2f", "1000 x KL": ".2f", "same token, %": ".1f"}


def language_tables(name: str, path: Path, text: str, count: int) -> Iterator[Table]:
    file = pyda8w4.checkpoints.open(path)
    windows = make_windows(text, file.metadata, count)
    kind = LlamaFileType(file.metadata["general.file_type"]).name.removeprefix("MOSTLY_")
    tokens = f"{count} windows, {windows.size // 2} tokens scored"
    model = Exchangeable(file)
    matrices = model.matrices()
    reference = model.predict_with([dense(w, gates) for w, gates in zip(matrices, model.gates)], FLOAT)
    with tempfile.TemporaryDirectory() as folder:
        rows = stored_rows(model, path, kind, Path(folder))
        columns = {heading: SIZES[heading] for heading in ("weights", "activations", "bits")} | SCORES
        yield Table(f"{name}, the file's {kind}: {tokens}", columns, measure(reference, rows, windows))
    title = f"{name}, the file's weights quantized again, with inputs in a random order: {tokens}"
    rows = quantized_rows(model, matrices)
    yield Table(title, SIZES | SCORES, measure(reference, rows, windows), "1000 x KL")


def make_windows(text: str, metadata: dict[str, Any], count: int) -> np.ndarray:
    """Each window is a context of its own, which begins as the model wants it."""
    begin = [metadata["tokenizer.ggml.bos_token_id"]] if adds_bos(metadata) else []
    tokens, size = make_tokenizer(metadata).encode(text).ids, WINDOW - len(begin)
    return np.array([begin + tokens[i : i + size] for i in range(0, count * size, size)])


# ---- figures -----------------------------------------------------------------------------------


def measure(reference: Predict, rows: Sequence[tuple[Row, Predict]], windows: np.ndarray) -> list[Row]:
    """Rows with their figures, below a row of the reference."""
    found = np.empty((len(rows), len(windows), 4))
    for i, tokens in enumerate(windows):
        exact = reference(tokens).copy()
        for j, (_, predict) in enumerate(rows):
            found[j, i] = compare(exact, predict(tokens), tokens[-len(exact) :])
        print(f"window {i + 1} of {len(windows)}", file=sys.stderr)
    first = {"weights": "float32", "activations": "float32", "perplexity": float(np.exp(found[0, :, 0].mean()))}
    return [first, *({**row, **summary(each)} for (row, _), each in zip(rows, found))]


def compare(exact: np.ndarray, logits: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Means over tokens of what `score` finds."""
    with ThreadPoolExecutor(pyda8w4.get_num_threads()) as threads:
        return np.mean(list(threads.map(score, exact, logits, after)), axis=0)


def score(exact: np.ndarray, logits: np.ndarray, after: int) -> tuple[float, float, float, bool]:
    """The loss of the exact model and of the other, the divergence of that from this, and whether both say the same."""
    p, q = log_softmax(exact), log_softmax(logits)
    return -p[after], -q[after], np.exp(p) @ (p - q), exact.argmax() == logits.argmax()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max().astype(float)
    return shifted - np.log(np.exp(shifted).sum())


def summary(scores: np.ndarray) -> Row:
    """Figures of a row of the table from those of its windows, which differ less from float32 than from each other."""
    exact, found, divergence, same = scores.T
    difference, error = mean_and_error(found - exact)
    ratio = np.exp(difference)
    return {
        "perplexity": float(np.exp(found.mean())),
        "over float32, %": (float(100 * (ratio - 1)), float(100 * ratio * error)),
        "1000 x KL": mean_and_error(1000 * divergence),
        "same token, %": float(100 * same.mean()),
    }


# ---- rows --------------------------------------------------------------------------------------


def stored_rows(model: Exchangeable, path: Path, kind: str, folder: Path) -> list[tuple[Row, Predict]]:
    """The exact weights of the file with every scheme, and llama.cpp."""
    rows = []
    for act in ("uint8", "int8", "int8_group", "int16"):
        rows.append(stored_row(model, f"the file's {kind}", act))
    if llama_cpp := import_llama_cpp():
        rows.append(llama_row(llama_cpp, path, kind))
        q4_0 = folder / "q4_0.gguf"
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        llama_cpp.llama_model_quantize(bytes(path), bytes(q4_0), ctypes.byref(parameters))
        rows.append(llama_row(llama_cpp, q4_0, "Q4_0"))
        rows.append(stored_row(Exchangeable(pyda8w4.checkpoints.open(q4_0)), "the same Q4_0", PROMPT_ACT))
    return rows


def quantized_rows(model: Exchangeable, matrices: Sequence[np.ndarray]) -> list[tuple[Row, Predict]]:
    """Quantizers with activations of 16 bits, which show the weights alone; the recommended one with uint8, too.

    A file's weights lie on a grid for each of its blocks, and a quantizer that finds that again gets them for nothing.
    So the inputs of each matrix are in a random order here: what shares a group comes from many blocks. (Noise of half
    a step, added to the weights, is no way out: rounding on the grid takes it away again.)
    """
    rng = np.random.default_rng(0)
    orders = [rng.permutation(w.shape[1]) for w in matrices]
    mixed = [w[:, order] for w, order in zip(matrices, orders)]
    rows = []
    for label, how in QUANTIZERS.items():
        for group in GROUPS:
            packed = [pyda8w4.quantize(w, group, **how) for w in mixed]
            size = {
                "groups of": group,
                "bits": 8 * sum(each.nbytes for each in packed) / sum(w.size for w in mixed),
                "SQNR, dB": np.mean([signal_to_noise(w, each.dequantize()) for w, each in zip(mixed, packed)]),
            }
            for act in ("int16", "uint8") if label == RECOMMENDED else ("int16",):
                layers = [rounded(*each) for each in zip(packed, orders, model.gates)]
                rows.append(({"weights": label, "activations": act, **size}, model.predict_with(layers, act)))
    return rows


def stored_row(model: Exchangeable, label: str, act: str) -> tuple[Row, Predict]:
    layers = [DA8W4(model.weights, names, gates) for names, gates in zip(model.names, model.gates)]
    packed = [weight for layer in layers for weight in layer.weights]
    bits = 8 * sum(each.nbytes for each in packed) / sum(np.prod(each.shape) for each in packed)
    return {"weights": label, "activations": act, "bits": bits}, model.predict_with(layers, act)


def llama_row(llama_cpp: Any, path: Path, kind: str) -> tuple[Row, Predict]:
    model = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)

    def predict(tokens: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(tokens.tolist())
        return model.scores[WINDOW // 2 - 1 : WINDOW - 1]

    matrices = [each for each in GGUFReader(path).tensors if each.name.startswith("blk.") and len(each.shape) == 2]
    bits = 8 * sum(each.n_bytes for each in matrices) / sum(each.n_elements for each in matrices)
    return {"weights": f"llama.cpp, {kind}", "activations": "its own", "bits": float(bits)}, predict


def import_llama_cpp() -> Any:
    """The module, or None: its rows are left out."""
    try:
        import llama_cpp
    except ImportError:
        return None
    return llama_cpp


# ---- layers --------------------------------------------------------------------------------------


class Exchangeable:
    """A model that runs with any linear layers in the place of its own.

    `names` are the matrices that make one layer, and `gates` is its activation, if it is one of gates and ups.
    """

    def __init__(self, file: pyda8w4.checkpoints.Checkpoint) -> None:
        self.names: list[list[str]] = []
        self.gates: list[str | None] = []
        self.layers: Sequence[Layer] = []
        self.model = Model(file, WINDOW, self.make_layer)
        self.logits = np.empty((WINDOW // 2, self.model.embeddings.shape[0]), np.float32)

    def make_layer(self, weights: Weights, names: list[str], activation: str | None = None) -> Layer:
        if not names[0].startswith("blk."):
            return DA8W4(weights, names)
        self.weights, place = weights, len(self.names)
        self.names.append(names)
        self.gates.append(activation)
        return lambda *call: self.layers[place](*call)

    def matrices(self) -> list[np.ndarray]:
        return [np.concatenate([self.weights.array(name) for name in names]) for names in self.names]

    def predict_with(self, layers: Sequence[Layer], act: str) -> Predict:
        """The logits are valid until the next call."""
        return partial(self.predict, layers, act)

    def predict(self, layers: Sequence[Layer], act: str, tokens: np.ndarray) -> np.ndarray:
        self.layers, self.model.act, self.model.position = layers, act, 0
        return self.model.logits(self.model.forward(tokens)[WINDOW // 2 - 1 : -1], self.logits)


def dense(w: np.ndarray, activation: str | None) -> Layer:
    if activation is None:
        return lambda x, out, act: np.matmul(x, w.T, out=out)
    return lambda x, out, act: gate(*np.split(x @ w.T, 2, axis=1), activation, out)


def rounded(packed: pyda8w4.PackedWeight, order: np.ndarray, activation: str | None) -> Layer:
    """A layer that puts its inputs into the order of those of `packed`."""
    if activation is None:
        return lambda x, out, act: pyda8w4.linear(x[:, order], packed, act=act, out=out)
    return lambda x, out, act: pyda8w4.linear_gated(x[:, order], packed, activation=activation, act=act, out=out)
