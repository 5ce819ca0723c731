"""The libraries whose linear layer is timed: one module for each, and in it a class for each way to call it.

An object is made in a process of its own (workers.py), from copies of one layer. The class says in `missing` why the
library cannot run here, and in `dense` which weights it stands for, so that its result is compared with
float64 of its own weights. Where a library quantizes the activations, that is part of each timed call.
"""

from __future__ import annotations

from importlib import import_module

from .base import PEERS, Layer, Peer, exact_product, relative_error

__all__ = ["PEERS", "Layer", "Peer", "exact_product", "relative_error"]

# The order of the tables.
for _library in ("pyda8w4", "onnxruntime", "openvino", "zentorch", "vllm", "gptqmodel", "ggml", "torch", "numpy"):
    import_module(f"{__name__}.{_library}")
