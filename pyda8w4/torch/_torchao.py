"""Int4 weights of torchao."""

from __future__ import annotations

from typing import Any

import torch


def int4_of(weight: Any) -> dict[str, Any] | None:
    """-> the arguments of `DA8W4Linear.from_int4` for a torchao int4 tensor as it is; None for a plain tensor.

    Those that keep codes, scales and zero points in plain tensors (IntxUnpackedToInt8Tensor) are known by
    what they have, not by their class, so that torchao is never imported.
    """
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return None
    int4 = str(getattr(weight, "target_dtype", None)) in ("torch.int4", "torch.uint4")  # not in every torch
    if not int4 or not isinstance(getattr(weight, "qdata", None), torch.Tensor):
        raise TypeError(
            f"weight is a {type(weight).__name__}, which keeps no plain int4 codes; give codes, scales and zero "
            "points to DA8W4Linear.from_int4"
        )
    return {
        "w_int4": weight.qdata,
        "scales": weight.scale,
        "zps": weight.zero_point,
        "group_size": weight.block_size[-1],
    }
