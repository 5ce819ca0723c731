"""Int4 weights of torchao."""

from __future__ import annotations

import torch


def int4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """-> codes, scales, zero points of a torchao int4 tensor as it holds them; None for a plain tensor."""
