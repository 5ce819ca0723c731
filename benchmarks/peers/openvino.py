"""OpenVINO: constants of type u4, and dynamic quantization of the activations.

One graph holds all copies, as a model holds its layers. The first product is an output, for the check. Of the others
one element each is an output, so that their memory is used again as in a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Call, Layer, Peer, eight_bits, four_bits, nibbles


class OpenVino(Peer):
    name = "openvino"
    about = "u4 weights, float16 scales, u4 zero points, dynamic quantization in groups of the weight's"
    packages = ("openvino",)
    per_pass = True

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=0.5)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return "K must be whole groups" if layer.shape[1] % layer.group_size else None

    def build(self) -> None:
        import openvino
        from openvino import opset13

        n, k = self.layer.shape
        self.core = openvino.Core()
        self.kept: list[np.ndarray] = []  # The model refers to this memory.
        x = opset13.parameter([-1, k], np.float32, name="x")
        outputs, ones = [], []
        for i, part in enumerate(self.layers()):
            w = self.weight(part)
            w = opset13.convert(opset13.reshape(w, [n, k], special_zero=False), np.float32)
            y = opset13.matmul(x, w, transpose_a=False, transpose_b=True)
            if i == 0:
                outputs.append(y)
            else:
                ones.append(opset13.slice(y, [0, 0], [1, 1], [1, 1], [0, 1]))
        if ones:
            outputs.append(opset13.concat(ones, 0))
        self.model = openvino.Model(outputs, [x], "layers")

    def weight(self, layer: Layer) -> Any:
        """Of shape (N, G, group) and float16, as the graph computes it from constants."""
        from openvino import opset13

        (n, k), group = layer.shape, layer.group_size
        w = opset13.subtract(
            self.constant("u4", nibbles(layer.codes.reshape(-1)), n, k // group, group),
            self.constant("u4", nibbles(layer.zps.reshape(-1)), n, k // group, 1),
        )
        return opset13.multiply(w, self.scales(layer.scales))

    def constant(self, kind: str, array: np.ndarray, *shape: int) -> Any:
        import openvino
        from openvino import opset13

        self.kept.append(array)
        tensor = openvino.Tensor(array, shape, getattr(openvino.Type, kind))
        return opset13.convert(openvino.op.Constant(tensor), np.float16)

    def scales(self, scales: np.ndarray) -> Any:
        import openvino

        return openvino.op.Constant(scales.astype(np.float16)[:, :, None])

    def bind(self, x: np.ndarray) -> list[Call]:
        import openvino

        self.model.reshape(list(x.shape))
        # The group must be a string, and no larger than the weight's: otherwise OpenVINO silently computes in float.
        config = {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self.layer.group_size),
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = self.core.compile_model(self.model, "CPU", config).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

        def call() -> Any:
            request.infer()
            return request

        return [call]

    def result(self, returned: Any) -> np.ndarray:
        return returned.get_output_tensor(0).data


class OpenVino8(OpenVino):
    name = "openvino-int8"
    about = "i8 weights, float16 scales, dynamic quantization in groups of the weight's"
    by_default = False

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size + 2 * layer.scales.size

    def weight(self, layer: Layer) -> Any:
        from openvino import opset13

        codes, scales = eight_bits(layer, per_column=False)
        shape = layer.shape[0], layer.shape[1] // layer.group_size, layer.group_size
        return opset13.multiply(self.constant("i8", codes.reshape(shape), *shape), self.scales(scales))

    def dense(self) -> np.ndarray:
        codes, scales = eight_bits(self.layer, per_column=False)
        rounded = scales.astype(np.float16).astype(np.float32)
        return codes * np.repeat(rounded, self.layer.group_size, axis=1)
