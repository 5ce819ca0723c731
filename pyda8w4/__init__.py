"""Linear layers with 4-bit weights and 8-bit activations (DA8W4) for x86 CPUs.

>>> import numpy as np
>>> import pyda8w4
>>> w = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
>>> packed = pyda8w4.prepack(*pyda8w4.quantize_weight(w, group_size=64))
>>> x = np.ones((3, 256), np.float32)
>>> pyda8w4.linear(x, packed).shape
(3, 64)
"""

from pyda8w4._files import load, save
from pyda8w4._linear import gemm, linear, quantize_activation
from pyda8w4._runtime import (
    cpu_info,
    get_include,
    get_library,
    get_num_threads,
    kernels,
    set_num_threads,
    use_kernel,
)
from pyda8w4._weight import PackedWeight, concat, prepack, quantize_weight

__version__ = "0.1.0"

__all__ = [
    "PackedWeight",
    "concat",
    "cpu_info",
    "gemm",
    "get_include",
    "get_library",
    "get_num_threads",
    "kernels",
    "linear",
    "load",
    "prepack",
    "quantize_activation",
    "quantize_weight",
    "save",
    "set_num_threads",
    "use_kernel",
]
