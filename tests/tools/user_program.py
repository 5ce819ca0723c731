"""A program of a user: it runs, and strict type checkers find nothing in it.

They must find what is ignored in `wrong`, since they report an ignore that is not needed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import pyda8w4
import pyda8w4.checkpoints
import pyda8w4.formats

rng = np.random.default_rng(0)
w = rng.standard_normal((64, 64), dtype=np.float32)
x = rng.standard_normal((3, 64), dtype=np.float32)

packed = assert_type(pyda8w4.quantize(w, 32, zeros="float", rotate=32), pyda8w4.PackedWeight)
weight = pyda8w4.quantize_weight(w, group_size=32, method="search", importance=[1.0] * 64)
assert_type(weight, pyda8w4.formats.QuantizedWeight)
again = pyda8w4.prepack(weight.codes, weight.scales, weight.zps, weight.offsets, bits=4)
same = pyda8w4.prepack(*weight)

y: npt.NDArray[np.floating] = pyda8w4.linear(x, packed, act="int8", out_dtype=np.float16)
y = pyda8w4.linear([[1.0] * 64], again, bias=np.zeros(64, np.float32), out_dtype="bfloat16")
y = pyda8w4.linear_gated(x, again, activation="gelu")
a, a_scales, a_zps = pyda8w4.quantize_activation(x)
y = pyda8w4.gemm(a, same, a_scales, a_zps, out=np.empty((3, 64), np.float32))
assert_type(again.dequantize([0, 1]), npt.NDArray[np.float32])

both = pyda8w4.concat([again, same])
experts = assert_type(pyda8w4.stack([both, both]), pyda8w4.PackedExperts)
down = pyda8w4.stack([again, again])
assert_type(experts[0], pyda8w4.PackedWeight)
y = pyda8w4.grouped_linear(x, experts, [1, 2])
y = pyda8w4.moe(x, experts, down, [[0, 1]] * 3, np.ones((3, 2), np.float32))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    pyda8w4.save(path, {"both": both[:64], "experts": experts})
    loaded = assert_type(pyda8w4.load(path), dict[str, pyda8w4.PackedWeight | pyda8w4.PackedExperts])
    checkpoint = assert_type(pyda8w4.checkpoints.open(path), pyda8w4.checkpoints.Checkpoint)
    assert_type(checkpoint.packed("both"), pyda8w4.PackedWeight)
    assert_type(checkpoint.array("both"), npt.NDArray[np.float32])

pyda8w4.set_num_threads(2)
with pyda8w4.use_kernel("scalar"):
    explanation = pyda8w4.explain(again, m=3)
    print(pyda8w4.get_num_threads(), pyda8w4.kernels(), pyda8w4.cpu_info()["kernel"], explanation.path, loaded.keys())


def wrong() -> None:
    pyda8w4.set_num_threads("2")  # type: ignore[arg-type]
    pyda8w4.linear(x, w)  # type: ignore[arg-type]
    pyda8w4.linear(x, [packed])  # type: ignore[arg-type]
    pyda8w4.linear(packed, packed)  # type: ignore[arg-type]
    pyda8w4.linear(x, packed, out=[0.0])  # type: ignore[arg-type]
    pyda8w4.linear(x, packed, out_dtype=16)  # type: ignore[arg-type]
    pyda8w4.linear(x, packed, act=np.uint8)  # type: ignore[arg-type]
    pyda8w4.quantize(w, "32")  # type: ignore[arg-type]
    pyda8w4.save("file", packed)  # type: ignore[arg-type]
    pyda8w4.matmul(x, packed)  # type: ignore[attr-defined]
