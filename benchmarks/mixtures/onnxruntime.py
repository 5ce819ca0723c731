"""onnxruntime: the operator QMoE, a session for each layer.

It chooses the experts itself: those of the highest router_probs, and weighs them by router_weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from peers import PEERS
from peers.base import nibbles

from .base import ALPHA, LIMIT, Call, Mixture, Shape, stacked


class OnnxRuntime(Mixture):
    name = "onnxruntime"
    about = "QMoE: accuracy_level=4, symmetric weights, float32 scales"
    like = PEERS["onnxruntime"]

    @classmethod
    def refuses(cls, shape: Shape, group_size: int) -> str | None:
        if shape.k % group_size or shape.i % group_size:
            return "K and I must be whole groups"
        return super().refuses(shape, group_size)

    @classmethod
    def expert_bytes(cls, shape: Shape, group_size: int) -> int:
        return shape.expert_size // 2 + 4 * shape.expert_size // group_size

    def build(self) -> None:
        self.sessions = [self._session(layer) for layer in range(self.layers)]

    def _session(self, layer: int) -> Any:
        import onnxruntime
        from onnx import TensorProto, helper

        experts, shape = self.experts, self.shape
        first = (experts.gate_up(order, interleaved=True) for order in experts.orders(layer))
        second = (experts.down.rolled(order) for order in experts.orders(layer))
        biases = experts.gate_up_bias(interleaved=True), experts.down_bias
        arrays: dict[str, np.ndarray] = {}
        for name, parts, bias in zip(("fc1", "fc2"), (first, second), biases):
            arrays[name], arrays[name + "_scales"] = stacked(parts, nibbles)
            if bias is not None:
                arrays[name + "_bias"] = bias
        names = [
            name if name in arrays else ""
            for part in ("fc1", "fc2")
            for name in (part, part + "_scales", part + "_bias")
        ]
        oai = shape.activation == "swigluoai"
        node = helper.make_node(
            "QMoE",
            ["x", "router_probs", *names, *[""] * 6, "router_weights"],
            ["y"],
            domain="com.microsoft",
            k=shape.top,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=ALPHA if oai else 1.0,
            activation_beta=1.0 if oai else 0.0,
            **({"swiglu_limit": LIMIT} if oai else {}),
            expert_weight_bits=4,
            block_size=experts.group_size,
            normalize_routing_weights=0,
            accuracy_level=4,
            weights_prepacked=0,
        )
        sizes = {"x": shape.k, "router_probs": shape.experts, "router_weights": shape.experts}
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in sizes.items()]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", shape.k])]
        graph = helper.make_graph([node], "layer", inputs, outputs, [_outside(*item) for item in arrays.items()])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_external_initializers(
            list(arrays), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        )
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        out = np.empty_like(x)

        def bound(layer: int, ids: np.ndarray) -> Call:
            probs = np.zeros((len(x), self.shape.experts), np.float32)
            np.put_along_axis(probs, ids.astype(np.int64), weights, axis=1)
            session = self.sessions[layer]
            binding = session.io_binding()
            for name, array in (("x", x), ("router_probs", probs), ("router_weights", probs)):
                binding.bind_cpu_input(name, array)
            binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)

            def call() -> np.ndarray:
                session.run_with_iobinding(binding)
                return out

            return call

        return [bound(layer, ids) for layer, ids in calls]

    def dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        experts = self.experts
        gate, up, down = (part.dense(symmetric=True) for part in (experts.gate, experts.up, experts.down))
        return gate, up, down


def _outside(name: str, array: np.ndarray) -> Any:
    """An initializer whose values the session is given beside the model, which could not hold 2 GB."""
    from onnx import TensorProto, helper

    tensor = TensorProto()
    tensor.name = name
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    location = tensor.external_data.add()
    location.key, location.value = "location", "memory"
    return tensor
