"""Checkpoints in folders, written here so that their headers and configs can be wrong, and one of every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cases import stored_arrays

import pyda8w4

TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "uint32": "U32", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def entry(array: np.ndarray, dtype: str | None = None) -> tuple[str, np.ndarray]:
    return dtype or TYPES[array.dtype.name], array


def write_file(
    path: Path,
    tensors: dict[str, Any],
    metadata: dict[str, str] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """A safetensors file of arrays, or types and arrays; `change` changes its header."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, value in tensors.items():
        dtype, array = value if isinstance(value, tuple) else entry(value)
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    if change:
        change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(
    path: Path,
    shards: dict[str, dict[str, Any]],
    config: dict[str, Any] | None = None,
    index: bool = True,
    metadata: dict[str, str] | None = None,
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    for name, tensors in shards.items():
        write_file(path / name, tensors, metadata)
    if index:
        places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


# ---- one layer of every method -----------------------------------------------------------------


@dataclass
class Example:
    """A layer "m.q" as a method stores it."""

    config: dict[str, Any]  # quantization_config
    tensors: dict[str, np.ndarray]
    floats: np.ndarray  # what they stand for, number by number
    metadata: dict[str, str] = field(default_factory=dict)


N, K, GROUP = 16, 64, 32
_rng = np.random.default_rng(5)
CODES, ZEROS = _rng.integers(0, 16, (N, K)), _rng.integers(1, 15, (N, K // GROUP))
SCALES = _rng.uniform(-2, 2, ZEROS.shape).astype(np.float16)
OFFSETS = _rng.uniform(-2, 2, ZEROS.shape).astype(np.float16)


def _floats(number: Callable[[int, int, int], float]) -> np.ndarray:
    """Of row, column and group: float64 holds them, float32 rounds them once."""
    out = np.empty((N, K), np.float32)
    for n, k in np.ndindex(N, K):
        out[n, k] = number(n, k, k // GROUP)
    return out


def _words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight codes of 4 bits of a row in a word: code i of them in field `order[i]`."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for row, column in np.ndindex(codes.shape):
        words[row, column // 8] |= np.uint32(int(codes[row, column]) << 4 * order[column % 8])
    return words.view(np.int32)


def _bytes(codes: np.ndarray) -> np.ndarray:
    """Two codes of a row in a byte, the first in its low bits."""
    return np.array([[a + 16 * b for a, b in zip(row[::2], row[1::2])] for row in codes.tolist()], np.uint8)


_SIGNED = _floats(lambda n, k, g: (float(CODES[n, k]) - 8) * float(SCALES[n, g]))
_WITH_ZEROS = _floats(lambda n, k, g: (float(CODES[n, k]) - float(ZEROS[n, g])) * float(SCALES[n, g]))
_WITH_OFFSETS = _floats(lambda n, k, g: float(CODES[n, k]) * float(SCALES[n, g]) + float(OFFSETS[n, g]))


def _gptq(zeros: np.ndarray, **config: Any) -> Example:
    words = {"m.q.qweight": _words(CODES).T, "m.q.qzeros": _words(zeros.T), "m.q.scales": SCALES.T}
    # Words lie along K, of which a row of the matrix has its own.
    return Example({"bits": 4, "group_size": GROUP, "sym": False, **config}, words, _WITH_ZEROS)


def _awq() -> Example:
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    tensors = {"m.q.qweight": _words(CODES.T, order), "m.q.qzeros": _words(ZEROS.T, order), "m.q.scales": SCALES.T}
    return Example({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, tensors, _WITH_ZEROS)


def _bitsandbytes() -> Example:
    maxima, codes = abs(_rng.standard_normal(N)).astype(np.float32), _rng.integers(-127, 128, (N, K)).astype(np.int8)
    # The scale is rounded to float32, and so is the product.
    wanted = _floats(lambda n, k, g: float(codes[n, k]) * float(np.float32(float(maxima[n]) / 127)))
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Example(config, {"m.q.weight": codes, "m.q.SCB": maxima, "m.q.weight_format": np.uint8(0)}, wanted)


def _compressed_tensors() -> Example:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    tensors = {"weight_packed": _words(CODES), "weight_scale": SCALES, "weight_shape": np.array([N, K])}
    return Example(config, {f"m.q.{name}": array for name, array in tensors.items()}, _SIGNED)


def _hqq() -> Example:
    groups = CODES.reshape(-1, GROUP)
    half = len(groups) // 2
    zeros = OFFSETS.reshape(-1, 1) + np.float16(7)
    tensors = {
        "W_q": (16 * groups[:half] + groups[half:]).astype(np.uint8), "scale": SCALES.reshape(-1, 1), "zero": zeros,
        "shape": np.array([N, K]), "nbits": np.array(4, np.int32), "group_size": np.array(GROUP, np.int32),
        "axis": np.array(1, np.int32), "packing": np.frombuffer(b"4bit_u8", np.uint8), "view_as_float": np.uint8(0),
        "quant_scale": np.uint8(0), "quant_zero": np.uint8(0),
    }  # fmt: skip
    wanted = _floats(lambda n, k, g: (float(CODES[n, k]) - float(zeros[2 * n + g, 0])) * float(SCALES[n, g]))
    return Example(
        {"quant_method": "hqq"}, {f"m.q.{name}": np.asarray(array) for name, array in tensors.items()}, wanted
    )


def _mlx(biases: str, **config: Any) -> Example:
    tensors = {"m.q.weight": _words(CODES).view(np.uint32), "m.q.scales": SCALES, f"m.q.{biases}": OFFSETS}
    return Example({"group_size": GROUP, "bits": 4, **config}, tensors, _WITH_OFFSETS)


def _mxfp4() -> Example:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-value for value in values]
    exponents = _rng.integers(100, 150, ZEROS.shape).astype(np.uint8)
    wanted = _floats(lambda n, k, g: values[CODES[n, k]] * 2.0 ** (int(exponents[n, g]) - 127) + 0.0)
    tensors = {"m.q_blocks": _bytes(CODES).reshape(N, K // GROUP, 16), "m.q_scales": exponents}
    return Example({"quant_method": "mxfp4"}, tensors, wanted)


def _torchao() -> Example:
    tensors = {"qdata": _bytes(CODES ^ 8), "scale": SCALES.T, "zero_point": OFFSETS.T}
    said = {"_type": "Int4Tensor", "_data": {"block_size": [1, GROUP], "shape": [N, K]}}
    # Codes of two's complement: those with a sign less 8.
    wanted = _floats(lambda n, k, g: (float(CODES[n, k]) - 8) * float(SCALES[n, g]) + float(OFFSETS[n, g]))
    named = {f"m.q._weight_{name}": array for name, array in tensors.items()}
    return Example({"quant_method": "torchao"}, named, wanted, {"m.q.weight": json.dumps(said)})


def _pyda8w4() -> Example:
    packed = pyda8w4.prepack(CODES.astype(np.uint8), SCALES, ZEROS)
    tensors = {"layout": np.array([2, N, K, GROUP]), **stored_arrays(packed)}
    return Example({"quant_method": "pyda8w4"}, {f"m.q.{name}": array for name, array in tensors.items()}, _WITH_ZEROS)


EXAMPLES = {
    "auto-round": _gptq(ZEROS, quant_method="auto-round", packing_format="auto_round"),
    "awq": _awq(),
    "bitsandbytes": _bitsandbytes(),
    "compressed-tensors": _compressed_tensors(),
    "gptq": _gptq(ZEROS - 1, quant_method="gptq"),
    "hqq": _hqq(),
    "intel/auto-round": _gptq(ZEROS - 1, quant_method="intel/auto-round", packing_format="auto_round:auto_gptq"),
    "metal": _mlx("qbiases", quant_method="metal"),
    "mlx": _mlx("biases", quant_method="mlx"),
    "mxfp4": _mxfp4(),
    "pyda8w4": _pyda8w4(),
    "torchao": _torchao(),
}
FLOATS = {"m.q.bias": SCALES[:, 0].astype(ml_dtypes.bfloat16), "norm.weight": OFFSETS[0].astype(np.float32)}


def write_example(path: Path, example: Example, key: str = "quantization_config", parts: int = 1) -> Path:
    """A folder with that layer and two tensors of floats, in one file or in several."""
    tensors = {**example.tensors, **FLOATS}
    shards: dict[str, dict[str, Any]] = {f"model-{i}.safetensors": {} for i in range(parts)}
    for i, (name, array) in enumerate(tensors.items()):
        shards[f"model-{i % parts}.safetensors"][name] = array
    return write_folder(path, shards, {key: example.config}, index=parts > 1, metadata=example.metadata)
