"""onnxruntime: the operator MatMulNBits.

One graph holds all copies, as a model holds its layers. The first product is an output, for the check. Of the others
one element each is an output, so that their memory is used again as in a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Call, Layer, Peer, four_bits, nibbles


class OnnxRuntime(Peer):
    name = "onnxruntime"
    about = "MatMulNBits: bits=4, accuracy_level=4, float32 scales, packed zero points"
    packages = ("onnxruntime", "onnx")
    per_pass = True

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=0.5)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        group = layer.group_size
        return None if group >= 16 and group & (group - 1) == 0 else "the group size must be a power of 2 from 16"

    def build(self) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        n, k = self.layer.shape
        nodes, weights = [], [numpy_helper.from_array(np.array([i]), f"at{i}") for i in range(2)]
        for i, part in enumerate(self.layers()):
            padded = np.zeros((n, part.zps.shape[1] * part.group_size), np.uint8)
            padded[:, :k] = part.codes
            arrays = {
                "w": nibbles(padded.reshape(n, -1, part.group_size)),
                "s": part.scales.reshape(-1),
                "z": nibbles(part.zps).reshape(-1),
            }
            weights += [numpy_helper.from_array(array, f"{name}{i}") for name, array in arrays.items()]
            sizes: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": part.group_size, "accuracy_level": 4}
            operands = ["x", *(f"{name}{i}" for name in arrays)]
            nodes.append(helper.make_node("MatMulNBits", operands, [f"y{i}"], domain="com.microsoft", **sizes))
            if i:
                nodes.append(helper.make_node("Slice", [f"y{i}", "at0", "at1", "at1"], [f"one{i}"]))
        outputs = [helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["m", n])]
        if self.copies > 1:
            nodes.append(helper.make_node("Concat", [f"one{i}" for i in range(1, self.copies)], ["ones"], axis=0))
            outputs.append(helper.make_tensor_value_info("ones", TensorProto.FLOAT, ["m", None]))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])]
        graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def bind(self, x: np.ndarray) -> list[Call]:
        binding = self.session.io_binding()
        binding.bind_cpu_input("x", x)
        for output in self.session.get_outputs():
            binding.bind_output(output.name)

        def call() -> Any:
            self.session.run_with_iobinding(binding)
            return binding

        return [call]

    def result(self, returned: Any) -> np.ndarray:
        return returned.get_outputs()[0].numpy()
