"""Time and memory of taking a whole checkpoint: a GPTQ model of 3 GB, with random weights.

    pip install . safetensors torch transformers
    python benchmarks/checkpoints.py [--folder FOLDER] [--layers 26]

Each step runs in a process of its own, which says its peak of anonymous memory (what it allocates) and of all
resident memory (with pages of files, which the system can take back), above what they were after imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from memory import peak_of
from safetensors.numpy import save_file

HIDDEN, INNER, VOCABULARY, GROUP = 4096, 11008, 32000, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCABULARY,
    "torch_dtype": "float16",
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
}
OF_LAYER = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, or is (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=26, help="default: 26, which make 3 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, packed = folder / "gptq", folder / "packed.safetensors"
        if not source.exists():
            make(source, options.layers)
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"checkpoint: {size / 1e9:.2f} GB, {options.layers} layers of {len(OF_LAYER)} matrices")
        print("\n| step | seconds | anonymous, peak GB | resident, peak GB |\n|---|---|---|---|")
        for name, step, path in (
            ("open", open_only, source),
            ("open, every layer packed, one after the other", pack_each, source),
            ("convert", convert, source),
            ("open the result, every layer", pack_each, packed),
            ("from_checkpoint, the folder", from_checkpoint, source),
            ("from_checkpoint, the result of convert", from_checkpoint, packed),
        ):
            seconds, anonymous, resident = measured(step, path)
            print(f"| {name} | {seconds:.1f} | {anonymous / 1e9:.2f} | {resident / 1e9:.2f} |", flush=True)


def make(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    places = {}
    for layer in range(-1, layers):
        name = f"model-{layer + 1:05}.safetensors"
        tensors = floats() if layer < 0 else layer_of(rng, f"model.layers.{layer}")
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def floats() -> dict[str, np.ndarray]:
    table = np.zeros((VOCABULARY, HIDDEN), np.float16)
    return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[0]}


def layer_of(rng: np.random.Generator, prefix: str) -> dict[str, np.ndarray]:
    norms = ("input_layernorm", "post_attention_layernorm")
    tensors = {f"{prefix}.{norm}.weight": np.ones(HIDDEN, np.float16) for norm in norms}
    for name, (n, k) in OF_LAYER.items():
        tensors[f"{prefix}.{name}.qweight"] = rng.integers(-(2**31), 2**31, (k // 8, n), np.int32)
        tensors[f"{prefix}.{name}.qzeros"] = np.full((k // GROUP, n // 8), 0x77777777, np.int32)
        tensors[f"{prefix}.{name}.scales"] = rng.uniform(0.001, 0.01, (k // GROUP, n)).astype(np.float16)
        tensors[f"{prefix}.{name}.g_idx"] = np.arange(k, dtype=np.int32) // GROUP
    return tensors


# ---- the steps: each gives what is measured, after its imports ---------------------------------


def open_only(path: Path) -> Callable[[], object]:
    import pyda8w4.checkpoints

    return lambda: pyda8w4.checkpoints.open(path)


def pack_each(path: Path) -> Callable[[], object]:
    import pyda8w4.checkpoints

    def run() -> None:
        checkpoint = pyda8w4.checkpoints.open(path)
        for name in checkpoint.types:
            if "proj" in name:
                checkpoint.packed(name)

    return run


def convert(path: Path) -> Callable[[], object]:
    import pyda8w4.__main__

    return lambda: pyda8w4.__main__.main(["convert", str(path), str(path.parent / "packed.safetensors")])


def from_checkpoint(path: Path) -> Callable[[], object]:
    import pyda8w4.torch.transformers

    return lambda: pyda8w4.torch.from_checkpoint(path)


def measured(step: Callable[[Path], Callable[[], object]], path: Path) -> tuple[float, int, int]:
    """-> seconds, and the growth of both peaks, in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(step, path, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def _child(step: Callable[[Path], Callable[[], object]], path: Path, out) -> None:
    run = step(path)
    begin = time.perf_counter()
    kept, peak, _ = peak_of(run)
    out.send((time.perf_counter() - begin, *peak))
    del kept
    out.close()


if __name__ == "__main__":
    main()
