"""vLLM in a process of its own: `Engine` starts it, and sends it models to generate with, one after another.

    engine = Engine(log)
    answer = engine.generate({"model": folder, "options": {"dtype": "float32"}, "prompts": ["..."], "tokens": 32})

Starting vLLM takes many seconds and a tiny model few, so models share a process. Where a process ended, the next model
gets a new one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from threading import Timer
from typing import Any

_cpus = sorted(os.sched_getaffinity(0))
# One process for a model that is not cut: three processes for each would each import all of vLLM again. Of two ranks
# each gets a CPU: vLLM itself wants a NUMA node for each.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"{_cpus[0]}|{_cpus[-1]}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engine:
    def __init__(self, folder: Path) -> None:
        """What vLLM prints, and what it compiles, goes to that folder."""
        self._log = folder / "log"
        self._environment = {**os.environ, **ENVIRONMENT}
        self._environment |= {"VLLM_CACHE_ROOT": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        self._process: Any = None

    def generate(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    env=self._environment, start_new_session=True,
                )  # fmt: skip
        began = self._log.stat().st_size
        watch = Timer(600, os.killpg, (self._process.pid, signal.SIGKILL))  # with the processes of ranks
        watch.start()
        print(json.dumps(job), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        watch.cancel()
        answer = json.loads(line) if line else {"error": f"the process ended: {self._process.wait()}"}
        if "error" in answer:
            self.close()
            said = self._log.read_bytes()[began:].decode(errors="replace")
            raise RuntimeError(f"{said[-8000:]}\n{answer['error']}")
        return answer

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.stdin.close()
            self._process = None


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of every prompt, and all logits that each was chosen by."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        job["model"], max_model_len=128, max_num_seqs=4, enable_prefix_caching=False, max_logprobs=-1,
        logprobs_mode="raw_logits", **job["options"],
    )  # fmt: skip
    parameters = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=-1)
    outputs = llm.generate(job["prompts"], parameters, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    answer = {
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "tokens": [list(one.token_ids) for one in found],
        "logits": [[[row[i].logprob for i in range(len(row))] for row in one.logprobs] for one in found],
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return answer


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints
    for line in sys.stdin:
        try:
            answer = generate(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
