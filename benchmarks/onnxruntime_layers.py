"""Linear layers of onnxruntime from float weights, each a session of its own, quantized by its own tools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32

# How the tools call what they do: its name here, the activations of the operator that they write, what it needs.
_FOUR_BITS = {
    "Default": ("nearest", "int8_group", ["onnx_ir"]),
    "KQuant": ("k-quant", "int8_group", ["onnx_ir"]),
    "HQQ": ("HQQ", "float32", ["onnx_ir", "torch"]),
}


def quantizers() -> Iterator[tuple[dict[str, Any], Any]]:
    """What a row is called, and the function that makes a graph with quantized weights of one of float weights.

    Without their packages there are none.
    """
    if not _have(["onnx", "onnxruntime"]):
        return
    for name, (label, act, needs) in _FOUR_BITS.items():
        if _have(needs):
            row = {"weights": f"onnxruntime, {label}", "groups of": BLOCK, "activations": act}
            yield row, partial(_four_bits, name)
    for per_channel, label in ((False, "a scale for each matrix"), (True, "a scale for each output")):
        row = {"weights": f"onnxruntime, 8 bits, {label}", "activations": "uint8 per tensor"}
        yield row, partial(_eight_bits, per_channel)


class OnnxLayer:
    """``x @ w.T`` by a graph that `quantize` made of it."""

    def __init__(self, quantize: Any, w: np.ndarray) -> None:
        import onnxruntime
        from onnx import numpy_helper

        graph = quantize(_float_graph(w))
        self.nbytes = sum(numpy_helper.to_array(each).nbytes for each in graph.graph.initializer)
        self.inputs = w.shape[1]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the threads of so many sessions would be in each other's way
        self.session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"x": x})[0]

    def dequantize(self) -> np.ndarray:
        """The product with ones, which every scheme of activations represents."""
        return self(np.eye(self.inputs, dtype=np.float32)).T


def _float_graph(w: np.ndarray) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    n, k = w.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n)))
    weights = [numpy_helper.from_array(np.ascontiguousarray(w.T), "w")]
    graph = helper.make_graph([node], "layer", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _four_bits(name: str, model: Any) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    how = {"block_size": BLOCK, "is_symmetric": False, "accuracy_level": 4}
    own = {"Default": how, "KQuant": {}, "HQQ": {"block_size": BLOCK}}[name]
    config = getattr(tools, f"{name}WeightOnlyQuantConfig")(**own)
    quantizer = tools.MatMulNBitsQuantizer(model, **how, algo_config=config)
    with _silence():
        quantizer.process()
    return quantizer.model.model


def _eight_bits(per_channel: bool, model: Any) -> Any:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _silence():
        quantize_dynamic(model, Path(folder) / "layer.onnx", per_channel=per_channel)
        return onnx.load(Path(folder) / "layer.onnx")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The tools log and print their progress, and HQQ's warns of arrays that it only reads."""
    before = logging.root.manager.disable
    logging.disable()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _have(packages: list[str]) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)
