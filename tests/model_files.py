"""Tiny models of transformers in files, as quantizers and converters write them."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 2.0**-20, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def random_model(kind: str, std: float = 0.2, **options: Any) -> Any:
    """A model in whose parameters no number is 0 or 1, so that every one of them matters."""
    cls = getattr(transformers, f"{kind}ForCausalLM")
    model = cls(cls.config_class(**{**TEXT, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, std)
    model.tie_weights()
    return model


# ---- GGUF ------------------------------------------------------------------------------------


def permuted(w: Any, heads: int) -> Any:
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


# Of K-quants, which the package gguf does not quantize to: where blocks have floats, and which times the numbers' size.
_HALVES = {"Q4_K": {0: 1 / 240, 2: 1 / 32}, "Q6_K": {208: 1 / 1300}}


def quantized(array: Any, dtype: Any) -> Any:
    """The bytes of rows of blocks; of K-quants, of other numbers of the same size."""
    import gguf

    if dtype.name not in _HALVES:
        return gguf.quantize(array, dtype)
    shape = gguf.quant_shape_to_byte_shape(array.shape, dtype)
    blocks = np.random.default_rng(zlib.crc32(array.tobytes())).integers(0, 256, shape, np.uint8)
    blocks = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[dtype][1])
    for at, times in _HALVES[dtype.name].items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(array.std() * times).tobytes(), np.uint8)
    return blocks.reshape(shape)


class Written:
    """A GGUF file of a model, as llama.cpp's converter and quantizer write it; `model` gets what the file has."""

    def __init__(
        self, path: Path, model: Any, architecture: str, *, heads: bool = False, shift: bool = False,
        values: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, without: str = "^$",
        types: Sequence[str] = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), experts: dict[str, str] | None = None,
        gate_is_vector: bool = False,
    ) -> None:  # fmt: skip
        gguf = pytest.importorskip("gguf", reason="gguf is not installed")
        self.path, self.config = path, (config := model.config)
        self.writer = writer = gguf.GGUFWriter(path, architecture)
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_pad_token_id(config.pad_token_id)
        usual = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters.get("rope_theta"),
        }
        for key, value in (usual | (values or {})).items():
            key = f"{architecture}.{key}"
            kinds = {int: "uint32", float: "float32", str: "string", list: "array", bool: "bool"}
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
        arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self.packed = set()
        tied = model.all_tied_weights_keys
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        for i, (name, tensor) in enumerate(state.items()):
            base, _, last = name.rpartition(".")
            array = tensor.numpy().copy()
            if base.endswith(".experts"):
                self.without = without
                self.add_experts(tensor, name, names, gguf, experts)
                continue
            if last == "sinks":
                base, last = name, "weight"
            target = f"{names.get_name(base)}.{last}"
            if target.endswith("ffn_gate_inp_shexp.weight") and gate_is_vector:
                array = array[0]
                writer.add_tensor(target, array)
                continue
            assert not target.startswith("None"), name
            if re.search(without, target):
                continue
            if array.ndim == 1:
                shifted = shift and last == "weight"
                stored = array + np.float32(shifted)
                tensor.copy_(torch.from_numpy(stored - np.float32(shifted)))
                if heads and base.endswith(("q_proj", "k_proj")):
                    stored = permuted(stored, self.heads(base, config))
                writer.add_tensor(target, stored)
                continue
            dtype = gguf.GGMLQuantizationType[types[i % len(types)]]
            data = quantized(array, dtype)
            tensor.copy_(torch.from_numpy(gguf.dequantize(data, dtype)))
            if heads and base.endswith(("q_proj", "k_proj")):
                data = permuted(data, self.heads(base, config))
            writer.add_tensor(target, data, raw_dtype=dtype)
            if dtype.name.startswith("Q") and not target.endswith("ffn_gate_inp.weight"):  # routers are no Linear
                self.packed.add(base)
        for name, array in (tensors or {}).items():
            array, dtype = array if type(array) is tuple else (array, None)
            writer.add_tensor(name, array, raw_dtype=dtype)
        model.tie_weights()
        self.packed |= {name.removesuffix(".weight") for name in tied if types[0].startswith("Q")}
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def add_experts(self, tensor: Any, name: str, names: Any, gguf: Any, types: dict[str, str] | None) -> None:
        """As `modify_tensors` of convert_hf_to_gguf.py: stacks of gates, ups and downs, with or without a bias."""
        base, last = name.removesuffix("_bias").rpartition(".")[::2]
        kind = "bias" if name.endswith("_bias") else "weight"
        is_gpt_oss = type(self.config).__name__ == "GptOssConfig"
        stacked = tensor.mT if is_gpt_oss and kind == "weight" else tensor
        parts = {last: stacked}
        if last == "gate_up_proj":
            halves = (stacked[:, ::2], stacked[:, 1::2]) if is_gpt_oss else stacked.chunk(2, dim=1)
            parts = dict(zip(("gate_proj", "up_proj"), halves))
        for part, values in parts.items():
            target = f"{names.get_name(f'{base}.{part}')}.{kind}"
            if re.search(self.without, target):
                continue
            if kind == "bias":
                self.writer.add_tensor(target, values.contiguous().numpy())
                continue
            dtype = gguf.GGMLQuantizationType[(types or {}).get(part, "Q4_0")]
            data = quantized(values.contiguous().numpy(), dtype)
            values.copy_(torch.from_numpy(gguf.dequantize(data, dtype)))  # a view of the model's
            self.writer.add_tensor(target, data, raw_dtype=dtype)
            if dtype.name != "F16":
                self.packed.add(base)

    @staticmethod
    def heads(base: str, config: Any) -> int:
        count: int = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
        return count


# ---- folders ---------------------------------------------------------------------------------


def gptq(codes: Any, zeros: Any, scales: Any, order: Any) -> dict[str, Any]:
    """(N, K) codes, (N, G) zero points and scales, (K,) the group of each k, as AutoGPTQ packs them."""
    n, k = codes.shape
    qweight, qzeros = np.zeros((k // 8, n), np.uint32), np.zeros((zeros.shape[1], n // 8), np.uint32)
    for i in range(8):
        qweight |= codes.T[i::8].astype(np.uint32) << np.uint32(4 * i)
        qzeros |= (zeros.T[:, i::8] - 1).astype(np.uint32) << np.uint32(4 * i)
    words = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales.T}
    return {**words, "g_idx": order.astype(np.int32)}


def awq(codes: Any, zeros: Any, scales: Any, order: Any) -> dict[str, Any]:
    """As AutoAWQ's gemm kernels have them: columns 0, 2, 4, 6, 1, 3, 5, 7 of eight are a word."""
    words = {"qweight": codes, "qzeros": zeros}
    for name, array in words.items():
        words[name] = np.zeros((array.shape[1], len(array) // 8), np.uint32)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[name] |= array.T[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return {**{name: array.view(np.int32) for name, array in words.items()}, "scales": scales.T}


def compressed(codes: Any, zeros: Any, scales: Any, order: Any) -> dict[str, Any]:
    """pack-quantized, asymmetric: codes along K, zero points along N."""
    weight = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    zero_point = np.zeros((len(codes) // 8, zeros.shape[1]), np.uint32)
    for i in range(8):
        weight |= codes[:, i::8].astype(np.uint32) << np.uint32(4 * i)
        zero_point |= zeros[i::8].astype(np.uint32) << np.uint32(4 * i)
    return {
        "weight_packed": weight.view(np.int32),
        "weight_zero_point": zero_point.view(np.int32),
        "weight_scale": scales,
        "weight_shape": np.array(codes.shape, np.int64),
    }


def without(pack: Callable[..., dict[str, Any]], *parts: str) -> Callable[..., dict[str, Any]]:
    return lambda *arrays: {name: array for name, array in pack(*arrays).items() if name not in parts}


def compressed_ordered(codes: Any, zeros: Any, scales: Any, order: Any) -> dict[str, Any]:
    symmetric = without(compressed, "weight_zero_point")
    return {**symmetric(codes, zeros, scales, order), "weight_g_idx": order.astype(np.int32)}


def int_quantized(codes: Any, zeros: Any, scales: Any, order: Any) -> dict[str, Any]:
    return {"weight": codes.astype(np.int8) - np.int8(8), "weight_scale": scales}


def _gptq_config(method: str = "gptq", **more: Any) -> Callable[[int], dict[str, Any]]:
    return lambda group: {"quant_method": method, "bits": 4, "group_size": group, **more}


def _awq_config(group: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": []}  # fmt: skip


def _compressed_config(format: str, symmetric: bool, act: Any = None, **more: Any) -> Callable[[int], dict[str, Any]]:
    def config(group: int) -> dict[str, Any]:
        size = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
        weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **size, **more}
        groups = {"targets": ["Linear"], "weights": weights, "input_activations": act, "output_activations": None}
        return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
                "ignore": [], "config_groups": {"group_0": groups}}  # fmt: skip

    return config


@dataclass(frozen=True)
class Method:
    """How a quantizer stores matrices."""

    arrays: Callable[..., dict[str, Any]]  # of codes, zero points, scales and the group of each k
    config: Callable[[int], dict[str, Any]]  # quantization_config, by the size of groups
    symmetric: bool = False
    ordered: bool = False  # groups are not of consecutive k


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
METHODS = {
    "gptq": Method(gptq, _gptq_config(desc_act=True, sym=False), ordered=True),
    "gptq symmetric": Method(gptq, _gptq_config(desc_act=False, sym=True), symmetric=True),
    "gptq asymmetric": Method(gptq, _gptq_config(desc_act=False, sym=False)),
    "gptq symmetric, ordered": Method(gptq, _gptq_config(desc_act=True, sym=True), symmetric=True, ordered=True),
    "auto-round": Method(
        without(gptq, "g_idx"), _gptq_config("auto-round", sym=True, packing_format="auto_round:auto_gptq"), True
    ),
    "awq": Method(awq, _awq_config),
    "compressed-tensors": Method(compressed, _compressed_config("pack-quantized", False)),
    "compressed-tensors symmetric": Method(
        without(compressed, "weight_zero_point"), _compressed_config("pack-quantized", True), True
    ),
    "compressed-tensors ordered": Method(
        compressed_ordered, _compressed_config("pack-quantized", True, actorder="group"), True, ordered=True
    ),
    "compressed-tensors W4A8": Method(int_quantized, _compressed_config("int-quantized", True, _INT8), True),
}  # fmt: skip


def write_folders(
    model: Any, path: Path, method: str, names: str = "_proj$", transposed: bool = False, group: int = 16,
    scales: tuple[float, float] = (0.01, 0.1),
) -> Any:  # fmt: skip
    """A checkpoint with quantized layers, and the float model of the same numbers; names are those in files.

    Codes and zero points are random, and so are scales, in this range. Groups may be -1: a row has one.
    """
    from safetensors.torch import load_file, save_file

    model.save_pretrained(path / "float")
    state = load_file(path / "float" / "model.safetensors")
    how = METHODS[method]
    rng, packed = np.random.default_rng(0), {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if layer == name or tensor.dim() != 2 or not re.search(names, layer):
            packed[name] = tensor
            continue
        n, k = reversed(tensor.shape) if transposed else tensor.shape
        size = k if group == -1 else group
        order = np.arange(k) // size
        if how.ordered:
            like = re.sub(r"gate|up|w3", "w1", re.sub("[kv]_proj", "q_proj", layer))  # have the same inputs
            order = np.random.default_rng(list(like.encode())).permutation(order)
        codes, zeros = rng.integers(0, 16, (n, k), np.uint8), rng.integers(1, 16, (n, k // size), np.uint8)
        if how.symmetric:
            zeros[:] = 8
        steps = rng.uniform(*scales, zeros.shape).astype(np.float16)
        weight = np.empty((n, k), np.float32)
        for i in range(k):
            of = order[i]
            weight[:, i] = (codes[:, i].astype(np.float32) - zeros[:, of]) * steps[:, of].astype(np.float32)
        state[name] = torch.from_numpy(weight.T.copy() if transposed else weight)
        arrays = how.arrays(codes, zeros, steps, order)
        packed |= {f"{layer}.{part}": torch.from_numpy(array.copy()) for part, array in arrays.items()}
    save_file(state, path / "float" / "model.safetensors", {"format": "pt"})
    shutil.copytree(path / "float", path / "quantized")
    save_file(packed, path / "quantized" / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "quantized" / "config.json").read_text())
    config["quantization_config"] = how.config(group)
    (path / "quantized" / "config.json").write_text(json.dumps(config))
    return type(model).from_pretrained(path / "float", dtype=torch.float32).eval()
