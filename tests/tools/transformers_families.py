"""Every model family of transformers: quantized while it is loaded, saved, loaded again.

    python tests/tools/transformers_families.py            # all; takes about half an hour on two cores
    python tests/tools/transformers_families.py llama t5   # some
    python tests/tools/transformers_families.py --direct   # by quantize_ on a model that is loaded already

For each family a tiny random model is built of a config whose sizes are cut by their names. The outcomes:

- exact: what was loaded again gives the same numbers, and generates the same tokens where it can;
- kept: so, too, and some layers besides the output head stayed float, with the reason;
- refused: an error that says why;
- wrong: anything else; the exit status is then 1;
- not tried: no tiny model could be built, run and saved without quantization, or it has no Linear.

Configs that no Auto class has a model for are counted as "no model": they are of parts of other models.

Each family runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from pyda8w4.torch import quantize_
from pyda8w4.torch._layer import PackedLayer
from pyda8w4.torch.transformers import DA8W4Config

# Of several classes of a family the first that exists, of these tasks.
TASKS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
MORE_TASKS = tuple(
    name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
)
GIVEN = {  # what a config needs that says nothing of it
    "prediction_length": 8,
    "vocab_size": 320,
    "attn_layer_indices": [1],
    "default_language": "en_XX",
    "head_dim": 16,
    "num_key_value_heads": 4,
}
SIZES = [  # a name, and what it becomes if it is larger; the first that matches counts
    (r"vocab_size$|n_vocab|vocab_size_per_layer", 320),
    (r"intermediate|ffn_dim|ffn_size|feed_forward|d_ff|n_inner|mlp_dim|ff_dim|ffn_hidden", 96),
    (r"feat_extract", None),
    (r"num_hidden_layers|n_layers?$|num_layers|encoder_layers|decoder_layers|num_\w*_layers|^depth$|num_blocks", 2),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads", 2),
    (r"linear_num_value_heads|linear_num_key_heads", 4),
    (r"heads$|n_head$|num_\w*heads", 4),
    (r"num_(local_)?experts$|n_routed_experts|num_experts|n_experts|moe_num_experts", 4),
    (r"experts_per_tok|moe_k$|topk|top_k|num_selected", 2),
    (r"n_group|topk_group", 1),
    (r"rotary_dim|head_dim|d_kv|kv_channels|head_size|_dim_head", 16),
    (r"q_lora_rank|kv_lora_rank|lora_rank|low_rank", 32),
    (r"max_position|max_seq|n_positions|n_ctx|max_source|max_target|max_length", 128),
    (r"upsample_groups", 64),
    (r"image_size", 32),
    (r"patch_size$", 8),
    (r"expansion|expand|ratio|factor|num_labels|kernel|stride|conv_|_id$|_index$|channels|version", None),
    (r"(hidden|d_model|n_embd|embed_dim|embedding|model_dim|_dim$|^dim$|_size$|width|state|projection)", 64),
]


def shrink(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.search("token_id|token_index", name):
        return value % 300 if value >= 0 else value
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return value if size is None else min(value, size)
    return value


# What is tried, one after the other, where sizes do not fit each other: names that keep their value.
VARIANTS = (
    r"^$",
    r"num_key_value_heads|num_kv_heads|n_kv_heads",
    r"heads?$|_dim$|rank|experts|group|topk|top_k",
    r"num_hidden_layers|layers_block_type|layer_types",
    r"^(?!.*(layers|vocab|experts|n_layer|depth))",
)


def tiny(cls: Any, keep: str) -> Any:
    """A config of small numbers, but for those whose name matches `keep`."""
    default = cls()
    parts = getattr(cls, "sub_configs", None) or {}
    made: dict[str, Any] = {}
    values = default.to_dict()
    depth = values.get("num_hidden_layers")
    # Lists that say what each layer is: one layer of each kind stays, two at least.
    lists = {
        name: list(map(str, value))
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }
    kinds = dict(zip(zip(*lists.values()), range(depth or 0)))
    chosen = sorted(kinds.values()) if len(kinds) > 1 else list(range(min(depth or 0, 2)))
    for name in lists:
        made[name] = [values[name][index] for index in chosen]
    # Where each stage has sizes of its own, the others must fit these.
    stages = any(
        isinstance(value, list) and re.search("heads|dims?$|dim_per|hidden_sizes", name)
        for name, value in values.items()
    )
    for name, value in values.items():
        if stages and re.search("hidden_size$|embed_dim", name):
            continue
        if name in parts or name in ("transformers_version", "architectures", "dtype", "model_type", "id2label"):
            continue
        new = shrink(name, value)
        if new != value and not re.search(keep, name):
            made[name] = new
        if re.search("tie_word", name):
            made[name] = value
    if lists:
        made["num_hidden_layers"] = len(chosen)
    for name, value in GIVEN.items():
        if name in values and values[name] is None:
            made[name] = value
    for name in parts:
        value = getattr(default, name, None)
        if isinstance(value, transformers.PreTrainedConfig):
            made[name] = tiny(type(value), keep)
    for _ in range(8):  # names that are read only, or that do not fit each other
        try:
            return rotating(cls(**made))
        except Exception as error:
            bad = [name for name in made if name in str(error)]
            if not bad:
                raise
            for name in bad:
                made.pop(name)
    return rotating(cls(**made))


def rotating(config: Any) -> Any:
    """With sections of rotary embeddings that fit the heads."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        for each in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
            if "mrope_section" in each or (
                each is rope and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
            ):
                heads = getattr(config, "num_attention_heads", 1)
                size = getattr(config, "head_dim", None) or config.hidden_size // heads
                half = int(size * each.get("partial_rotary_factor", 1)) // 2
                each["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return config


def first(config: Any, names: str, default: Any) -> Any:
    """The first number of these names in a config or its parts."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})]
    for part in parts:
        for name in names.split():
            value = getattr(part, name, None)
            value = value[-1] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return default


def known_inputs(config: Any) -> dict[str, list[torch.Tensor]]:
    """What models take, by its name: one tensor, or some of other shapes."""
    ids = torch.arange(12)[None] % 9 + 5
    vision = getattr(config, "vision_config", config)
    channels = first(vision, "num_channels in_channels in_chans", 3)
    size = getattr(vision, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    frames = first(vision, "num_frames frames_per_clip", 2)
    patch, merge = first(vision, "patch_size", 8), first(vision, "spatial_merge_size", 2)
    depth = first(vision, "temporal_patch_size patch_temporal", 1)
    grid = torch.tensor([[1, 4, 4]])
    flat = channels * patch * patch
    image = [
        torch.randn(1, channels, height, width),
        torch.randn(1, frames, channels, height, width),
        torch.randn(1, 2, channels, height, width),
        torch.randn(1, 1, channels, height, width),
        *(torch.randn(16, size) for size in (flat * depth, flat, flat * 2)),
        torch.randn(16, channels, patch, patch),
        torch.randn(4, merge * patch, merge * patch, channels),
        torch.randn(1, 16, flat),
    ]
    mels = first(config, "num_mel_bins mel_bins n_mels feature_size input_dim input_feat_per_channel", 80)
    frames = 2 * first(config, "max_source_positions", 48)
    context = first(config, "context_length", None) or first(config, "prediction_length", 8)
    past = context + max(getattr(config, "lags_sequence", None) or [0])
    ahead = first(config, "prediction_length", 8)
    series = first(config, "num_input_channels", 1)
    width = first(config, "d_model hidden_size", 64)
    return {
        "input_ids": [ids],
        "attention_mask": [torch.ones_like(ids)],
        "decoder_input_ids": [ids[:, :5]],
        "qformer_input_ids": [ids],
        "pixel_values": image,
        "hidden_states": [*image[4:7], torch.randn(1, 16, width), torch.randn(1, width, 16)],
        "pixel_values_videos": [image[1]],
        "prompt_pixel_values": image,
        "prompt_masks": image,
        "bool_masked_pos": [torch.zeros(1, 16, dtype=torch.bool)],
        "grid_thw": [grid],
        "image_grid_thw": [grid],
        "merge_sizes": [torch.tensor([2])],
        "target_sizes": [torch.tensor([[4, 4]])],
        "spatial_shapes": [torch.tensor([[4, 4]])],
        "pixel_attention_mask": [torch.ones(1, 16, dtype=torch.long)],
        "pixel_position_ids": [torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]],
        "bbox": [torch.arange(4).expand(1, 12, 4) * 10, torch.arange(8).expand(1, 12, 8) / 10],
        "input_values": [
            torch.randn(shape)
            for shape in ((1, 4000), (1, 1, 4000), (1, 7680), (1, 1, 7680), (1, first(config, "max_length", 128), mels))
        ],
        "audio_values": [torch.randn(1, 1, 4000)],
        "input_features": [
            torch.randn(shape)
            for shape in ((1, frames, mels), (1, mels, frames), (mels, frames), (1, 1, frames, mels), (1, frames, 160))
        ],
        "input_features_mask": [torch.ones(1, frames, dtype=torch.long), torch.ones(1, frames, dtype=torch.bool)],
        "feature_attention_mask": [torch.ones(1, frames, dtype=torch.long)],
        "audio_mel_mask": [torch.zeros(1, frames, dtype=torch.bool)],
        "audio_mel": [torch.randn(1, frames, mels)],
        "feature_lens": [torch.tensor([frames])],
        "input_lengths": [torch.tensor([frames])],
        "query_embeds": [torch.randn(1, 8, width)],
        "visual_feats": [torch.randn(1, 8, first(config, "visual_feat_dim", 64))],
        "visual_pos": [torch.rand(1, 8, 4)],
        "flattened_patches": [torch.rand(1, 16, 2 + flat)],
        "pixel_mask": [torch.ones(1, height, height, dtype=torch.long)],
        "task_inputs": [ids],
        "past_values": [torch.randn(1, past), torch.randn(1, past, series), torch.randn(2, 32)],
        "past_time_features": [torch.randn(1, past, first(config, "num_time_features", 0))],
        "past_observed_mask": [torch.ones(1, past)],
        "past_values_padding": [torch.zeros(2, 32, dtype=torch.long)],
        "freq": [torch.zeros(2, 1, dtype=torch.long)],
        "future_values": [torch.randn(1, ahead)],
        "future_time_features": [torch.randn(1, ahead, first(config, "num_time_features", 0))],
        "states": [torch.randn(1, 5, first(config, "state_dim", 17))],
        "actions": [torch.randn(1, 5, first(config, "act_dim", 4))],
        "rewards": [torch.randn(1, 5, 1)],
        "returns_to_go": [torch.randn(1, 5, 1)],
        "timesteps": [torch.arange(5)[None]],
        "state": [torch.randn(1, first(config, "max_state_dim", 32))],
        "noise": [torch.randn(1, first(config, "chunk_size", 8), first(config, "max_action_dim", 32))],
        "timestep": [torch.rand(1)],
    }


def inputs_of(model: Any) -> dict[str, Any]:
    """The first inputs that the model takes.

    Tried are those of its main input and of what its signature demands; where an error names an input, that is given,
    too.
    """
    known, main = known_inputs(model.config), model.main_input_name
    taken = inspect.signature(model.forward).parameters
    if main not in known or main not in taken:
        main = next((name for name in taken if name in known), "input_ids")
    errors = []

    def attempt(inputs: dict[str, Any]) -> dict[str, Any] | None:
        for _ in range(8):
            try:
                run(model, inputs)
                return inputs
            except Exception as error:
                errors.append(error)
                text = str(error)
                named = [
                    name for name in taken if name in known and name not in inputs and re.search(rf"\b{name}\b", text)
                ]
                if not named:
                    return None
                inputs = {**inputs, **{name: known[name][0] for name in named}}
        return None

    needed = {
        name: known[name]
        for name, parameter in taken.items()
        if parameter.default is parameter.empty and name in known and name != main
    }
    mains = [{main: value} for value in known[main]]
    if main == "input_ids":
        mains = [{main: known[main][0], "attention_mask": known["attention_mask"][0]}]
    others = [dict(zip(needed, values)) for values in itertools.product(*needed.values())] or [{}]
    extras: list[list[str]] = [[]]
    if getattr(model.config, "is_encoder_decoder", False):
        extras.insert(0, ["decoder_input_ids"])
    extras += [[name] for name in ("pixel_values", "input_ids") if name in taken and name != main]
    extras += [[name] for name in ("grid_thw", "image_grid_thw", "target_sizes", "bbox", "future_values")]
    extras += [[name] for name in ("input_features", "input_values", "input_features_mask", "pixel_mask")]
    extras += [["pixel_values", "qformer_input_ids"], ["actions", "rewards", "returns_to_go", "timesteps"]]
    for extra in extras:
        if main in extra or not set(extra) <= taken.keys() | {"decoder_input_ids"}:
            continue
        for values in itertools.product(*(known[name] for name in extra)):
            for start, other in itertools.product(mains, others):
                inputs = attempt({**start, **other, **dict(zip(extra, values))})
                if inputs is not None:
                    return inputs
    raise errors[0]


def numbers(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in numbers(part)] if isinstance(value, (list, tuple)) else []


def run(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return numbers(model(**inputs))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b))


def generate(model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
    if not model.can_generate():
        return None
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    torch.manual_seed(1)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return numbers(out)[0]


def aligned(model: Any) -> Any:
    """With float tensors in memory of their own: where a file has them, torch's own products may round otherwise."""
    for module in model.modules():
        if not isinstance(module, PackedLayer):
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if type(tensor) in (torch.Tensor, nn.Parameter):
                    tensor.data = tensor.data.clone()
    return model


class NotTried(Exception):
    """No tiny model, or nothing to replace."""


def build(name: str, model_classes: list[str]) -> tuple[Any, dict[str, Any]]:
    """A model of the first class, and of few numbers, that can be built and run."""
    reasons = []
    for model_class, keep in itertools.product(model_classes, VARIANTS):
        cls = getattr(transformers, model_class)
        try:
            config = tiny(CONFIG_MAPPING[name], keep)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in cls(config).parameters())
            if count > 3e8:
                raise NotTried("too large")
            torch.manual_seed(0)
            if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", 0) is None:
                config.decoder_start_token_id = 0
            model = cls(config).eval()
            if not any(
                isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)) for module in model.modules()
            ):
                raise NotTried("no Linear")
            return model, inputs_of(model)
        except ImportError as error:
            reasons.append("needs a package: " + " ".join(str(error).split())[:200])
        except NotTried as error:
            reasons.append(str(error))
        except Exception as error:
            reasons.append(f"no inputs: {type(error).__name__}: {error}".replace("\n", " ")[-300:])
    raise NotTried(reasons[0])


def load(cls: Any, config_class: Any, folder: str, **options: Any) -> Any:
    # The class of the config, since some families have the models of others.
    return cls.from_pretrained(folder, config=config_class.from_pretrained(folder), **options)


def check(name: str, model_classes: list[str], direct: bool, folder: str) -> tuple[str, str]:
    try:
        model, inputs = build(name, model_classes)
        cls, config_class = type(model), type(model.config)
        try:
            can_generate = generate(model, inputs) is not None
        except Exception:
            can_generate = False
        model.save_pretrained(f"{folder}/float")
        model = load(cls, config_class, f"{folder}/float")
    except NotTried as error:
        return "not tried", str(error)
    except Exception as error:
        return "not tried", f"not saved or loaded without quantization: {type(error).__name__}: {error}"
    stage = "quantize"
    try:
        if direct:
            report = quantize_(model, 32)
            kept = report.kept
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = load(cls, config_class, f"{folder}/float", quantization_config=DA8W4Config(32))
            lines = [line.strip() for w in caught for line in str(w.message).splitlines() if "bytes" not in line]
            kept = {line: line.partition(" % ")[2] for line in lines}
            left = [m for m in model.modules() if isinstance(m, nn.Linear)]
        aligned(model)
        layers = sum(isinstance(module, PackedLayer) for module in model.modules())
        stage = "forward"
        want = run(model, inputs)
        stage = "generate"
        tokens = generate(model, inputs) if can_generate else None
        stage = "save"
        model.save_pretrained(f"{folder}/packed")
        stage = "load"
        again = aligned(load(cls, config_class, f"{folder}/packed"))
        stage = "compare"
        if sum(isinstance(module, PackedLayer) for module in again.modules()) != layers:
            return "wrong", "other layers are packed after loading"
        if not same(run(again, inputs), want):
            return "wrong", "other numbers after loading"
        if tokens is not None and not torch.equal(generate(again, inputs), tokens):
            return "wrong", "other tokens after loading"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{stage}: {type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        ours = type(error) is ValueError and "pyda8w4" in where.filename
        return ("refused" if ours else "wrong"), text
    others = {
        key: reason for key, reason in kept.items() if "output head" not in reason and "shared with" not in reason
    }
    note = f"{cls.__name__}: {layers} packed" + (", generates" if tokens is not None else "")
    if others or (not direct and not layers and left):
        return "kept", f"{note}; " + "; ".join(others.values() if not direct else map(": ".join, others.items()))
    return "exact", note


def families() -> dict[str, list[str]]:
    """The classes of each family, those first that do more."""
    found: dict[str, list[str]] = {}
    for task in (*TASKS, *MORE_TASKS):
        for name, classes in getattr(modeling_auto, task, {}).items():
            model_class = classes if isinstance(classes, str) else classes[0]
            if name in CONFIG_MAPPING and hasattr(transformers, model_class):
                of_name = found.setdefault(name, [])
                if model_class not in of_name:
                    of_name.append(model_class)
    return dict(sorted(found.items()))


def child(name: str, model_classes: list[str], direct: bool, out: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            result = check(name, model_classes, direct, folder)
        except BaseException as error:
            result = "wrong", f"{type(error).__name__}: {error}"
    os.write(out, json.dumps(result).encode()[:60000])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="families; all when none is given")
    parser.add_argument("--direct", action="store_true", help="quantize_ on a loaded model")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=90, help="seconds for each family")
    parser.add_argument("--output", help="a JSON file for the outcomes")
    args = parser.parse_args()
    todo = [(name, cls) for name, cls in families().items() if not args.names or name in args.names]
    total, results = len(todo), {}
    running: dict[int, tuple[str, int, float]] = {}
    while todo or running:
        while todo and len(running) < args.jobs:
            name, model_classes = todo.pop(0)
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                child(name, model_classes, args.direct, write)
                os._exit(0)
            os.close(write)
            running[pid] = name, read, time.monotonic()
        for pid, (name, read, start) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - start > args.limit
            if not ended and late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if ended or late:
                text = b""
                with contextlib.closing(os.fdopen(read, "rb")) as pipe:
                    text = pipe.read()
                died = "not tried" if late else "wrong", "took too long" if late else f"died with status {status}"
                results[name] = json.loads(text) if text else died
                del running[pid]
                print(f"{len(results)}/{total} {name}: {results[name][0]}: {results[name][1]}"[:400], flush=True)
        time.sleep(0.02)
    counts = Counter(outcome for outcome, _ in results.values())
    print(f"transformers {transformers.__version__}, torch {torch.__version__}:", dict(counts))
    without = len(CONFIG_MAPPING_NAMES.keys() - families().keys())
    print(f"no model: {without} more configs are of parts of models, or of none that has Auto classes")
    print(
        "not tried:",
        dict(Counter(text.partition(":")[0] for outcome, text in results.values() if outcome == "not tried")),
    )
    if args.output:
        with open(args.output, "w") as file:
            json.dump(results, file, indent=1)
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
