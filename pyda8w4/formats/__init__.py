"""Quantized weights of other libraries' formats, as `pyda8w4.prepack` takes them.

One module for each format. Its functions take the tensors of a layer as they are stored, and give a
`QuantizedWeight` that stands for the same numbers, exactly; what a format defines that this library cannot hold is
refused with the reason. `pyda8w4.checkpoints.open` finds the tensors in files and calls these functions.
"""

from pyda8w4._quantized import QuantizedWeight

__all__ = ["QuantizedWeight"]
