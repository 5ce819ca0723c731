"""OpenVINO: constants of type u4, and dynamic quantization of the activations.

One graph holds all copies, as a model holds its layers. The first product is an output, for the check. Of the others
one element each is an output, so that their memory is used again as in a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Call, Layer, Peer, four_bits, nibbles


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
        group = self.layer.group_size
        self.core = openvino.Core()
        self.kept: list[np.ndarray] = []  # The model refers to this memory.
        x = opset13.parameter([-1, k], np.float32, name="x")
        outputs, ones = [], []
        for i, part in enumerate(self.layers()):

            def u4(codes: np.ndarray, *shape: int) -> Any:
                self.kept.append(nibbles(codes.reshape(-1)))
                tensor = openvino.Tensor(self.kept[-1], shape, openvino.Type.u4)
                return opset13.convert(openvino.op.Constant(tensor), np.float16)

            w = opset13.subtract(u4(part.codes, n, k // group, group), u4(part.zps, n, k // group, 1))
            w = opset13.multiply(w, openvino.op.Constant(part.scales.astype(np.float16)[:, :, None]))
            w = opset13.convert(opset13.reshape(w, [n, k], special_zero=False), np.float32)
            y = opset13.matmul(x, w, transpose_a=False, transpose_b=True)
            if i == 0:
                outputs.append(y)
            else:
                ones.append(opset13.slice(y, [0, 0], [1, 1], [1, 1], [0, 1]))
        if ones:
            outputs.append(opset13.concat(ones, 0))
        self.model = openvino.Model(outputs, [x], "layers")

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
