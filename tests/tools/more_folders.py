"""What `fuzz_load.py --format folder` changes beside the examples of tests/folders.py: other kinds of layers.

They have random tensors of the right shapes and types.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from cases import Weight, pack, stored_arrays
from folders import Example

import pyda8w4
from pyda8w4._format import ARRAYS
from pyda8w4.formats import bitsandbytes


def random_tensors(**tensors: Any) -> dict[str, np.ndarray]:
    """Of a layer "m.q", by name: a type and a shape, or an array."""
    rng = np.random.default_rng(0)
    found = {}
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind, *shape = value
            dtype = np.dtype(kind)
            value = rng.uniform(0.5, 2, shape).astype(dtype)
            if dtype.kind in "iu":
                # Bytes may be floats: those are finite.
                most = 120 if dtype == np.uint8 else np.iinfo(dtype).max
                value = rng.integers(np.iinfo(dtype).min, most, shape, dtype, endpoint=True)
        found[f"m.q.{name}"] = np.asarray(value)
    return found


def more_examples() -> list[Example]:
    zeros, order = np.full((2, 2), 0x77777777, np.int32), np.random.default_rng(0).permutation(np.arange(64) // 32)
    gptq = {"qweight": ("i4", 8, 16), "qzeros": ("i4", 2, 2), "scales": ("f2", 2, 16)}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [16, 64]}
    nested = {**state, "nested_blocksize": 256, "nested_offset": 0.1, "nested_dtype": "float32"}
    table = bitsandbytes._TABLES["nf4"]
    hqq = {
        "scale": ("f2", 32, 1), "zero": ("f2", 32, 1), "shape": np.array([16, 64]), "group_size": np.int32(32),
        "view_as_float": np.uint8(0), "quant_scale": np.uint8(0), "quant_zero": np.uint8(0), "axis": np.int32(1),
    }  # fmt: skip
    kinds = [
        Weight(33, 70, 12, "float16", 0, True, table=True, supers=2, perm=True, factors=True),
        Weight(40, 64, 16, "float16", bits=6, supers=2, rotation=32),
        Weight(33, 64, 32, "float16", 3, offsets=True),
    ]

    def config(method: str, **more: Any) -> dict[str, Any]:
        return {"quant_method": method, "bits": 4, "group_size": 32, **more}

    def groups(format: str, **more: Any) -> dict[str, Any]:
        group = {"targets": ["re:.*q", "Linear"], "weights": {**weights, **more}}
        return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}

    def torchao(kind: str, tensors: dict[str, Any], **said: Any) -> Example:
        entry = {"_type": kind, "_data": {"block_size": [1, 32], "shape": [16, 64], **said}}
        entry["_tensor_data_names"] = list(tensors)
        named = {name.replace("m.q.", "m.q._weight_"): array for name, array in random_tensors(**tensors).items()}
        return Example({"quant_method": "torchao"}, named, table, {"m.q.weight": json.dumps(entry)})

    def layout(weight: pyda8w4.PackedWeight) -> dict[str, np.ndarray]:
        names = [name for name in ARRAYS if name in stored_arrays(weight) or name == "zps"]
        there = sum(1 << i for i, name in enumerate(ARRAYS) if name in names)
        numbers = [2, *weight.shape, weight.group_size, weight.bits, weight.super_size, there]
        zps = {} if "zps" in stored_arrays(weight) else {"zps": np.int8(weight.zero_point)}
        return {"layout": np.array(numbers), **stored_arrays(weight), **zps}

    e4m3, bf16 = "float8_e4m3fn", "bfloat16"
    rules = {"-:head": {}, "+:m": {"bits": 4}}
    found = [
        (config("gptq", sym=False, desc_act=True, dynamic=rules), {**gptq, "g_idx": order.astype(np.int32)}),
        (config("gptq", sym=True), {**gptq, "qzeros": zeros}),
        (config("gptq", bits=8, sym=False, format="gptq_v2"),
         {"qweight": ("i4", 16, 16), "qzeros": ("i4", 2, 4), "scales": ("f4", 2, 16)}),
        (config("auto-round", sym=False, packing_format="auto_round:auto_awq", extra_config={"q": {"bits": 4}}),
         {"qweight": ("i4", 64, 2), "qzeros": ("i4", 2, 2), "scales": (bf16, 2, 16)}),
        (config("awq", version="gemv"), {"qweight": ("i4", 16, 8), "qzeros": ("i4", 16, 4), "scales": ("f2", 16, 32)}),
        (config("awq", version="gemv_fast"),
         {"qweight": ("i2", 4, 64), "qzeros": ("f2", 32, 16), "scales": ("f2", 32, 16)}),
        (groups("pack-quantized", symmetric=False, actorder="group"),
         {"weight_packed": ("i4", 16, 8), "weight_scale": (bf16, 16, 2), "weight_zero_point": ("i4", 2, 2),
          "weight_shape": np.array([16, 64]), "weight_g_idx": order.astype(np.int32)}),
        (groups("pack-quantized"),
         {"weight_packed": ("i4", 2, 16, 8), "weight_scale": ("f2", 2, 16, 2), "weight_shape": np.array([2, 16, 64])}),
        (groups("pack-quantized", num_bits=3, strategy="channel", group_size=None),
         {"weight_packed": ("i4", 16, 6), "weight_scale": ("f4", 16, 1), "weight_shape": np.array([16, 64])}),
        (groups("int-quantized", num_bits=8, symmetric=False),
         {"weight": ("i1", 16, 64), "weight_scale": ("f4", 16, 2), "weight_zero_point": ("i1", 16, 2)}),
        (groups("mxfp4-pack-quantized", type="float"),
         {"weight_packed": ("u1", 16, 32), "weight_scale": ("u1", 16, 2)}),
        (groups("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
         {"weight_packed": ("u1", 2, 16, 32), "weight_scale": (e4m3, 2, 16, 4), "weight_global_scale": ("f4", 1)}),
        (groups("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[8, 32]),
         {"weight": (e4m3, 16, 64), "weight_scale": (bf16, 2, 2)}),
        ({"quant_method": "bitsandbytes"},
         {"weight": ("u1", 512, 1), "weight.absmax": ("f4", 16), "weight.quant_map": table,
          "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)}),
        ({"quant_method": "bitsandbytes"},
         {"weight": ("u1", 512, 1), "weight.absmax": ("u1", 16), "weight.nested_absmax": ("f4", 1),
          "weight.nested_quant_map": ("f4", 256),
          "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(nested).encode(), np.uint8)}),
        ({"quant_method": "hqq"},
         {**hqq, "W_q": ("u1", 16, 32), "nbits": np.int32(4), "packing": np.frombuffer(b"4bit_u8", np.uint8),
          "axis": np.int32(0), "scale": ("f2", 1, 32), "zero": ("f2", 1, 32)}),
        ({"quant_method": "hqq"},
         {**hqq, "W_q": ("i4", 4, 32), "nbits": np.int32(3), "packing": np.frombuffer(b"3bit_32", np.uint8)}),
        ({"quant_method": "hqq"},
         {**hqq, "W_q": ("f2", 16, 16), "nbits": np.int32(4), "packing": np.frombuffer(b"4bit_u8", np.uint8),
          "view_as_float": np.uint8(1)}),
        (config("mlx", bits=3, **{"m.q": {"group_size": 32, "bits": 3}, "m.o": False}),
         {"weight": ("u4", 2, 16, 6), "scales": (bf16, 2, 16, 2), "biases": (bf16, 2, 16, 2)}),
        (config("mlx", mode="mxfp4"), {"weight": ("u4", 16, 8), "scales": ("u1", 16, 2)}),
        (config("mlx", mode="nvfp4", group_size=16), {"weight": ("u4", 16, 8), "scales": ("u1", 16, 4)}),
        (config("mlx", mode="mxfp8", bits=8), {"weight": ("u4", 16, 16), "scales": ("u1", 16, 2)}),
        *(({"quant_method": "pyda8w4", "group_size": 32}, layout(pack(kind))) for kind in kinds),
    ]  # fmt: skip
    stack = {"m.q_blocks": ("u1", 2, 16, 2, 16), "m.q_scales": ("u1", 2, 16, 2)}
    experts = {name: random_tensors(x=value)["m.q.x"] for name, value in stack.items()}
    int8 = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}}
    codes = np.random.default_rng(0).integers(-8, 8, (16, 64)).astype(np.int8)
    return [
        *(Example(config, random_tensors(**tensors), table) for config, tensors in found),
        Example({"quant_method": "mxfp4"}, experts, table),
        torchao("IntxUnpackedToInt8Tensor",
                {"qdata": codes, "scale": ("f2", 16, 2), "zero_point": ("f2", 16, 2)}, **int8),
        torchao("Int8Tensor", {"qdata": ("i1", 16, 64), "scale": (bf16, 16, 2), "act_pre_scale": ("f4", 64)}),
        torchao("Int4PlainInt32Tensor",
                {"qdata": ("i4", 2, 16, 8), "scale": ("f2", 2, 2, 16), "zero_point": ("i1", 2, 2, 16)},
                block_size=[1, 1, 32], shape=[2, 16, 64]),
        torchao("Int4TilePackedTo4dTensor", {"qdata": ("i4", 2, 1, 32, 2), "scale_and_zero": (bf16, 2, 16, 2)}),
    ]  # fmt: skip
