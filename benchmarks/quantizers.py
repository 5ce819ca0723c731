"""The quantizers that quality.py compares, and what one number says of their weights."""

from __future__ import annotations

from typing import Any

import numpy as np

GROUPS = (32, 64, 128)

# Each name is a row, or a line of a plot: the arguments of pyda8w4.quantize that it stands for.
QUANTIZERS: dict[str, dict[str, Any]] = {
    "min/max, integer zeros": {"method": "minmax", "zeros": "integer"},
    "search, integer zeros": {"zeros": "integer"},
    "search, symmetric": {"zeros": "none"},
    "search, offsets": {},
    "search, offsets, two levels": {"two_level": True},
    "search, offsets, rotation": {"rotate": 32},
}
# Those of pyda8w4.torch.calibrate.
CALIBRATED: dict[str, dict[str, Any]] = {"calibrated, offsets": {}, "calibrated, offsets, rotation": {"rotate": 32}}
RECOMMENDED = "search, offsets"


def signal_to_noise(w: np.ndarray, rounded: np.ndarray) -> float:
    """Signal over noise of a rounded matrix, in decibels: 6 more are one bit more."""
    return float(10 * np.log10(np.sum(w**2, dtype=float) / np.sum((w - rounded) ** 2, dtype=float)))
