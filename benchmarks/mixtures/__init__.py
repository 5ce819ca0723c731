"""The libraries whose mixture of experts is timed: one module for each, as in peers/.

An object is made in a process of its own (experts.py), from layers of random experts. A class names the one of
peers.PEERS that has the same format of weights, and says in `dense` which weights it stands for.
"""

from __future__ import annotations

from importlib import import_module

from .base import MIXTURES, SHAPES, Experts, Mixture, Routing, Shape, routing

__all__ = ["MIXTURES", "SHAPES", "Experts", "Mixture", "Routing", "Shape", "routing"]

# The order of the tables.
for _library in ("pyda8w4", "onnxruntime", "zentorch", "ggml", "transformers"):
    import_module(f"{__name__}.{_library}")
