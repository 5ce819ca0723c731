"""Zero points that are floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def without_zeros(zeros: npt.NDArray[Any], scales: npt.NDArray[Any], least: int, most: int) -> dict[str, Any]:
    """Zero points and offsets for ``(code - zeros) * scales``: the arguments of `QuantizedWeight`, by name.

    Zero points where all are integers from `least` to `most`; else offsets ``-zeros * scales``, and zero points of 0.
    ValueError if one of these products is not exact in float32: those of two float16 always are.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if ((zeros >= least) & (zeros <= most) & (zeros == np.rint(zeros))).all():
            return {"zps": zeros.astype(np.int16)}
        exact = zeros.astype(np.float64) * -scales.astype(np.float64)  # 24 bits times 24 bits fit 53
        offsets = exact.astype(np.float32)
    if not (offsets == exact).all():
        raise ValueError("the products of zero points and scales must be exact in float32, got one that is not")
    return {"zps": np.zeros(offsets.shape, np.int16), "offsets": offsets}
