"""ggml: the graph that llama.cpp builds for a mixture of experts, from the chosen experts on.

Gate, up and down are a product of their own each (ggml_mul_mat_id), with the activation, the weights and the sum
between and after them. The graph's memory is planned by ggml, too, so that steps work in place where llama.cpp's do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from peers import PEERS
from peers.ggml import GgmlLibrary, Init

from .base import ALPHA, LIMIT, Call, Mixture

_P, _SIZE, _INT, _I64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "new_tensor_3d": (_P, [_P, _INT, _I64, _I64, _I64]),
    "mul_mat_id": (_P, [_P] * 4),
    "add_id": (_P, [_P] * 4),
    "swiglu_split": (_P, [_P] * 3),
    "swiglu_oai": (_P, [_P] * 3 + [ctypes.c_float] * 2),
    "mul": (_P, [_P] * 3),
    "add": (_P, [_P] * 3),
    "view_2d": (_P, [_P, _P, _I64, _I64, _SIZE, _SIZE]),
    "set_output": (None, [_P]),
    "get_data": (_P, [_P]),
    "backend_supports_op": (ctypes.c_bool, [_P, _P]),
    "gallocr_new": (_P, [_P]),
    "gallocr_free": (None, [_P]),
    "gallocr_alloc_graph": (ctypes.c_bool, [_P, _P]),
}
_F32, _I32 = 0, 26  # in enum ggml_type
_NODES = 128  # more than a graph has


class _GgmlMixture(GgmlLibrary, Mixture):
    def build(self) -> None:
        self.load(self.threads, _FUNCTIONS)
        ggml, experts, shape = self.ggml, self.experts, self.shape
        self.rows = [self.quantize(part.dense()) for part in (experts.gate, experts.up, experts.down)]
        repacking = self.repacking()
        buffers = repacking if self._takes_experts(repacking) else ggml.backend_cpu_buffer_type()
        self.context = ggml.init(Init(3 * self.layers * ggml.tensor_overhead(), None, True))
        self.tensors = [self._new_experts(self.context, shape.experts) for _ in range(self.layers)]
        ggml.backend_alloc_ctx_tensors_from_buft(self.context, buffers)
        for layer, tensors in enumerate(self.tensors):
            for tensor, rows in zip(tensors, self.rows):
                self._set(tensor, np.stack([np.roll(rows, order, axis=0) for order in experts.orders(layer)]))
        self.bound: Any = None

    def _new_experts(self, context: Any, count: int) -> list[Any]:
        """Tensors of gate, up and down."""
        sizes = [(self.shape.k, self.shape.i)] * 2 + [(self.shape.i, self.shape.k)]
        return [self.ggml.new_tensor_3d(context, self.format.number, *size, count) for size in sizes]

    def _takes_experts(self, buffers: Any) -> bool:
        """Whether experts of this format can be multiplied in such buffers."""
        if buffers is None:
            return False
        ggml = self.ggml
        context = ggml.init(Init(9 * ggml.tensor_overhead(), None, True))
        weights = self._new_experts(context, 2)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffers)
        ids = ggml.new_tensor_2d(context, _I32, 1, 1)
        rows = [ggml.new_tensor_3d(context, _F32, k, 1, 1) for k in (self.shape.k, self.shape.i)]
        products = [ggml.mul_mat_id(context, weights[part], row, ids) for part, row in zip((0, 2), rows)]
        found = all(ggml.backend_supports_op(self.backend, product) for product in products)
        ggml.free(context)
        ggml.backend_buffer_free(buffer)
        return found

    def _set(self, tensor: Any, array: np.ndarray) -> None:
        self.ggml.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def bind(self, x: np.ndarray, weights: np.ndarray, calls: Sequence[tuple[int, np.ndarray]]) -> list[Call]:
        ggml, (m, k), top = self.ggml, x.shape, weights.shape[1]
        if self.bound is not None:
            contexts, buffer, memory = self.bound
            ggml.gallocr_free(memory)
            ggml.backend_buffer_free(buffer)
            for context in contexts:
                ggml.free(context)
        biases = (self.experts.gate_bias, self.experts.up_bias, self.experts.down_bias)
        given = {"x": x, "weights": weights, **dict(zip(("gate", "up", "down"), biases))}
        inputs = ggml.init(Init((5 + len(calls)) * ggml.tensor_overhead(), None, True))
        tensors = {
            "x": ggml.new_tensor_3d(inputs, _F32, k, 1, m),
            "weights": ggml.new_tensor_3d(inputs, _F32, 1, top, m),
        }
        for name, bias in given.items():
            if name not in tensors and bias is not None:
                tensors[name] = ggml.new_tensor_2d(inputs, _F32, *bias.shape[::-1])
        ids = [ggml.new_tensor_2d(inputs, _I32, top, m) for _ in calls]
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(inputs, ggml.backend_cpu_buffer_type())
        for name, tensor in tensors.items():
            self._set(tensor, np.ascontiguousarray(given[name]))
        for tensor, (_, array) in zip(ids, calls):
            self._set(tensor, np.ascontiguousarray(array, np.int32))

        size = _NODES * ggml.tensor_overhead() + ggml.graph_overhead_custom(_NODES, False)
        context = ggml.init(Init(len(calls) * size, None, True))
        memory = ggml.gallocr_new(ggml.backend_cpu_buffer_type())  # that of all graphs: they are equal
        graphs, outputs = [], []
        for tensor, (layer, _) in zip(ids, calls):
            graph = ggml.new_graph_custom(context, _NODES, False)
            out = self._mixture(context, graph, self.tensors[layer], tensor, tensors, m)
            ggml.gallocr_alloc_graph(memory, graph)
            graphs.append(graph)
            outputs.append(out)
        self.bound = (inputs, context), buffer, memory
        data = ctypes.cast(ggml.get_data(outputs[0]), ctypes.POINTER(ctypes.c_float))
        self.out = np.ctypeslib.as_array(data, (m, k))
        return [partial(ggml.backend_graph_compute, self.backend, graph) for graph in graphs]

    def _mixture(
        self, context: Any, graph: Any, experts: Sequence[Any], ids: Any, tensors: dict[str, Any], m: int
    ) -> Any:
        """What llm_graph_context::build_moe_ffn makes of the chosen experts."""
        ggml, (k, top) = self.ggml, (self.shape.k, self.shape.top)

        def product(name: str, weight: Any, rows: Any) -> Any:
            y = ggml.mul_mat_id(context, weight, rows, ids)
            return ggml.add_id(context, y, tensors[name], ids) if name in tensors else y

        up = product("up", experts[1], tensors["x"])
        gate = product("gate", experts[0], tensors["x"])
        if self.shape.activation == "silu":
            h = ggml.swiglu_split(context, gate, up)
        else:
            h = ggml.swiglu_oai(context, gate, up, ALPHA, LIMIT)
        y = ggml.mul(context, product("down", experts[2], h), tensors["weights"])
        slots = [ggml.view_2d(context, y, k, m, 4 * k * top, 4 * k * slot) for slot in range(top)]
        for slot in slots:
            ggml.build_forward_expand(graph, slot)
        out = slots[0]
        for slot in slots[1:]:
            out = ggml.add(context, out, slot)
        ggml.set_output(out)
        ggml.build_forward_expand(graph, out)
        return out

    def result(self, returned: Any) -> np.ndarray:
        return self.out

    def dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gate, up, down = map(self.dequantize, self.rows)
        return gate, up, down


class Q40(_GgmlMixture):
    name = "ggml-q4_0"
    about = "three mul_mat_id of symmetric blocks of 32, repacked where ggml has a layout for this CPU"
    like: ClassVar = PEERS["ggml-q4_0"]
    format = like.format


class Q4K(_GgmlMixture):
    name = "ggml-q4_k"
    about = "three mul_mat_id of blocks of 32 with 6-bit scales and minima, repacked where ggml has a layout"
    like: ClassVar = PEERS["ggml-q4_k"]
    format = like.format
