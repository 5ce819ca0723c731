"""Floats of 4 and 8 bits that formats store, as the Open Compute Project defines them.

E2M1 is what codes of 4 bits stand for: a table of int8 holds twice its values, which are integers, and so the scales
beside it are half of those that are stored.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def half_of_e8m0(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """``2**(bits - 128)``, half of what E8M0 stands for, exactly. 255 is NaN there, and 2**127 here."""
    return np.ldexp(np.float32(1), bits.astype(np.int32) - 128)


def _e4m3() -> npt.NDArray[np.float32]:
    bits = np.arange(256)
    exponents, mantissas = bits >> 3 & 15, bits & 7
    absolute = np.ldexp((np.minimum(exponents, 1) * 8 + mantissas).astype(np.float32), np.maximum(exponents, 1) - 10)
    absolute[bits & 127 == 127] = np.nan
    return np.where(bits < 128, absolute, -absolute)


_E4M3 = _e4m3()


def e4m3(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What E4M3 without infinities stands for, with NaN where it is that: of 127 and 255."""
    return _E4M3[bits]
