"""Linear layers with 4-bit weights and 8-bit activations (DA8W4) for CPUs.

>>> import numpy as np
>>> import pyda8w4
>>> w = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
>>> packed = pyda8w4.quantize(w, group_size=64)
>>> x = np.ones((3, 256), np.float32)
>>> pyda8w4.linear(x, packed).shape
(3, 64)
"""

import typing as _typing

try:
    from pyda8w4._core import version as _version
except ModuleNotFoundError as _error:
    raise ImportError(
        f"{__path__[0]} has no compiled module for this Python. In a clone of the repository, `python -c` and "
        "`python -m` find these sources before the installed package: use the commands `pyda8w4` and `pytest`, "
        "work in another folder, or install the clone with `pip install -e .`"
    ) from _error

from pyda8w4._concat import concat
from pyda8w4._experts import PackedExperts, stack
from pyda8w4._explain import Explanation, explain
from pyda8w4._files import load, save
from pyda8w4._linear import gemm, linear, linear_gated
from pyda8w4._moe import grouped_linear, moe
from pyda8w4._packed import PackedWeight
from pyda8w4._prepack import prepack
from pyda8w4._quantize import quantize, quantize_activation, quantize_weight
from pyda8w4._runtime import (
    cpu_info,
    get_cmake_dir,
    get_include,
    get_library,
    get_num_threads,
    get_pkgconfig_dir,
    kernels,
    set_num_threads,
    use_kernel,
)

__version__ = _version()

if not _typing.TYPE_CHECKING:  # type checkers would take any name

    def __getattr__(name: str) -> None:
        hint = f": `import pyda8w4.{name}` comes first" if name in ("checkpoints", "formats", "torch") else ""
        raise AttributeError(f"module 'pyda8w4' has no attribute {name!r}{hint}")


__all__ = [
    "Explanation",
    "PackedExperts",
    "PackedWeight",
    "concat",
    "cpu_info",
    "explain",
    "gemm",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "get_num_threads",
    "get_pkgconfig_dir",
    "grouped_linear",
    "kernels",
    "linear",
    "linear_gated",
    "load",
    "moe",
    "prepack",
    "quantize",
    "quantize_activation",
    "quantize_weight",
    "save",
    "set_num_threads",
    "stack",
    "use_kernel",
]
