"""ggml, called through ctypes: the matrix product of llama.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from .base import Call, Layer, Peer


class Init(ctypes.Structure):
    _fields_: ClassVar = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_P, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # A name without ggml_, and what it returns and takes.
    "init": (_P, [Init]),
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


@dataclass(frozen=True)
class Format:
    """A type of ggml's tensors."""

    name: str
    number: int  # Its value in enum ggml_type.
    block: int  # How many weights it holds.
    block_bytes: int
    repacked: bool  # Whether weights get the layout that ggml has for this CPU, if it has one.


class GgmlLibrary:
    """The libraries of llama-cpp-python or in $GGML_LIBRARY_DIR, and weights of one format."""

    format: ClassVar[Format]

    @staticmethod
    def _folder() -> Path | None:
        if "GGML_LIBRARY_DIR" in os.environ:
            return Path(os.environ["GGML_LIBRARY_DIR"])
        spec = importlib.util.find_spec("llama_cpp")
        return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"

    def load(self, threads: int, functions: Mapping[str, tuple[Any, list[Any]]]) -> None:
        """Open the libraries and a backend; `functions` are those that `self.ggml` has beside _FUNCTIONS."""
        folder = self._folder()
        assert folder is not None
        self.libraries = [ctypes.CDLL(str(folder / f"libggml-{part}.so")) for part in ("base", "cpu")]
        self.ggml = SimpleNamespace()
        for name, (result, arguments) in {**_FUNCTIONS, **functions}.items():
            function = next(lib[f"ggml_{name}"] for lib in self.libraries if hasattr(lib, f"ggml_{name}"))
            function.restype, function.argtypes = result, arguments
            setattr(self.ggml, name, function)
        self.backend = self.ggml.backend_cpu_init()
        self.ggml.backend_cpu_set_n_threads(self.backend, threads)

    def repacking(self) -> Any:
        """The type of buffers that change the layout of a weight that is set in them; None where there is none."""
        ggml = self.ggml
        device = ggml.backend_get_device(self.backend)
        address = ggml.backend_reg_get_proc_address(
            ggml.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
        )
        types = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
        return next((found for found in takewhile(bool, types) if ggml.backend_buft_name(found) == b"CPU_REPACK"), None)

    def quantize(self, w: np.ndarray) -> np.ndarray:
        """Rows of blocks, a row for each of w."""
        n, k = w.shape
        rows = np.empty((n, k // self.format.block * self.format.block_bytes), np.uint8)
        self.ggml.quantize_chunk(self.format.number, w.ctypes.data, rows.ctypes.data, 0, n, k, None)
        return rows

    def dequantize(self, rows: np.ndarray) -> np.ndarray:
        w = np.empty((len(rows), rows.shape[1] // self.format.block_bytes * self.format.block), np.float32)
        function = getattr(self.libraries[0], f"dequantize_row_{self.format.name}")
        function.restype, function.argtypes = None, [_P, _P, ctypes.c_int64]
        function(rows.ctypes.data, w.ctypes.data, w.size)
        return w


class _Ggml(GgmlLibrary, Peer):
    """The product with weights of one format."""

    packages = ("llama-cpp-python",)

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
        return layer.codes.size // cls.format.block * cls.format.block_bytes

    @classmethod
    def refuses(cls, layer: Layer) -> str | None:
        return f"K must be a multiple of {cls.format.block}" if layer.shape[1] % cls.format.block else None

    def build(self) -> None:
        self.load(self.threads, {})
        ggml = self.ggml
        n, k = self.layer.shape
        self.context = ggml.init(Init(self.copies * ggml.tensor_overhead(), None, True))
        self.tensors = [ggml.new_tensor_2d(self.context, self.format.number, k, n) for _ in range(self.copies)]
        buffers = (self.format.repacked and self.repacking()) or ggml.backend_cpu_buffer_type()
        ggml.backend_alloc_ctx_tensors_from_buft(self.context, buffers)
        self.quantized = self.quantize(self.layer.dense())
        for i, tensor in enumerate(self.tensors):
            rolled = np.roll(self.quantized, i, axis=0)
            ggml.backend_tensor_set(tensor, rolled.ctypes.data, 0, rolled.nbytes)
        self.bound: Any = None

    def bind(self, x: np.ndarray) -> list[Call]:
        ggml = self.ggml
        if self.bound is not None:
            context, buffer = self.bound
            ggml.free(context)
            ggml.backend_buffer_free(buffer)
        m, (n, k) = len(x), self.layer.shape
        size = (1 + self.copies) * ggml.tensor_overhead() + self.copies * ggml.graph_overhead_custom(4, False)
        context = ggml.init(Init(size, None, True))
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
        return self.dequantize(self.quantized)


class Q40(_Ggml):
    name = "ggml-q4_0"
    about = "symmetric blocks of 32 with a float16 scale, repacked where ggml has a layout for this CPU"
    format = Format("q4_0", number=2, block=32, block_bytes=18, repacked=True)


class Q4K(_Ggml):
    name = "ggml-q4_k"
    about = "blocks of 32 with 6-bit scales and minima, not repacked"
    format = Format("q4_K", number=12, block=256, block_bytes=144, repacked=False)


class Q6K(_Ggml):
    name = "ggml-q6_k"
    about = "blocks of 16 with 8-bit scales, not repacked"
    by_default = False
    format = Format("q6_K", number=14, block=256, block_bytes=210, repacked=False)


class Q80(_Ggml):
    name = "ggml-q8_0"
    about = "8 bits, blocks of 32 with a float16 scale, not repacked"
    by_default = False
    format = Format("q8_0", number=8, block=32, block_bytes=34, repacked=False)
