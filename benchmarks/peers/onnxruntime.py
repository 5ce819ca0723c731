"""onnxruntime: the operators MatMulNBits and DynamicQuantizeMatMul.

One graph holds all copies, as a model holds its layers. The first product is an output, for the check. Of the others
one element each is an output, so that their memory is used again as in a model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .base import Call, Layer, Peer, eight_bits, eight_bits_dense, four_bits, nibbles


class _OnnxRuntime(Peer):
    packages = ("onnxruntime", "onnx")
    per_pass = True
    operator: ClassVar[str] = "MatMulNBits"
    bits: ClassVar[int]  # of MatMulNBits

    def operands(self, layer: Layer) -> dict[str, np.ndarray]:
        """What the operator takes beside x, in its order."""
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        n, k = self.layer.shape
        return {"K": k, "N": n, "bits": self.bits, "block_size": self.layer.group_size, "accuracy_level": 4}

    def build(self) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        n, k = self.layer.shape
        nodes, weights = [], [numpy_helper.from_array(np.array([i]), f"at{i}") for i in range(2)]
        for i, part in enumerate(self.layers()):
            arrays = self.operands(part)
            weights += [numpy_helper.from_array(array, f"{name}{i}") for name, array in arrays.items()]
            operands = ["x", *(f"{name}{i}" for name in arrays)]
            nodes.append(
                helper.make_node(self.operator, operands, [f"y{i}"], domain="com.microsoft", **self.attributes())
            )
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


def _power_of_2(layer: Layer) -> str | None:
    group = layer.group_size
    return None if group >= 16 and group & (group - 1) == 0 else "the group size must be a power of 2 from 16"


class OnnxRuntime(_OnnxRuntime):
    name = "onnxruntime"
    about = "MatMulNBits: bits=4, accuracy_level=4, float32 scales, packed zero points"
    bits = 4

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=0.5)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return _power_of_2(layer)

    def operands(self, layer: Layer) -> dict[str, np.ndarray]:
        n, k = layer.shape
        padded = np.zeros((n, layer.zps.shape[1] * layer.group_size), np.uint8)
        padded[:, :k] = layer.codes
        codes = nibbles(padded.reshape(n, -1, layer.group_size))
        return {"w": codes, "s": layer.scales.reshape(-1), "z": nibbles(layer.zps).reshape(-1)}


class OnnxRuntime8(_OnnxRuntime):
    name = "onnxruntime-8bit"
    about = "MatMulNBits: bits=8, accuracy_level=4, float32 scales"
    by_default = False
    bits = 8

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size + 4 * layer.scales.size

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return "K must be whole groups" if layer.shape[1] % layer.group_size else _power_of_2(layer)

    def operands(self, layer: Layer) -> dict[str, np.ndarray]:
        codes, scales = eight_bits(layer, per_column=False)
        unsigned = codes.view(np.uint8) ^ np.uint8(128)
        return {"w": unsigned.reshape(layer.shape[0], -1, layer.group_size), "s": scales.reshape(-1)}

    def dense(self) -> np.ndarray:
        return eight_bits_dense(self.layer, per_column=False)


class OnnxRuntimeDynamic(_OnnxRuntime):
    name = "onnxruntime-int8"
    about = "DynamicQuantizeMatMul: 8-bit weights, a scale for each column, activations quantized per tensor"
    by_default = False
    operator = "DynamicQuantizeMatMul"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size + 4 * layer.shape[0]

    def operands(self, layer: Layer) -> dict[str, np.ndarray]:
        codes, scales = eight_bits(layer, per_column=True)
        return {"w": np.ascontiguousarray(codes.T), "s": scales[:, 0].copy()}

    def attributes(self) -> dict[str, Any]:
        return {}

    def dense(self) -> np.ndarray:
        return eight_bits_dense(self.layer, per_column=True)
