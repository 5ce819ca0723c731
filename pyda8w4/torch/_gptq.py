"""GPTQ (Frantar and others, 2022): a weight is rounded input by input, and what one loses the next ones make up for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pyda8w4._quantize import Rounding, rotated
from pyda8w4._quantized import QuantizedWeight
from pyda8w4.reference import rotate

_DAMPING = 0.01  # of the mean square of all inputs, which is added to each: those that are never seen count, too
_COLUMNS = 128  # after so many, the ones behind them are changed by one product


def round_weight(weight: torch.Tensor, moments: torch.Tensor, rounding: Rounding) -> QuantizedWeight:
    """Round a weight so that its outputs change little.

    Parameters
    ----------
    weight : (N, K) tensor of floats
        Not changed.
    moments : (K, K) tensor of floats
        Of its inputs: the sum over rows of their products with each other.
    rounding : Rounding
        Scales are searched as it says, those of a group when the ones before it are rounded.

    Returns
    -------
    QuantizedWeight
        Whose outputs for these inputs are nearer to those of `weight` than if each number were rounded to its nearest.
    """
    w, h = weight.detach().float(), moments.double()
    if rounding.rotate:
        w = torch.from_numpy(rotated(w.numpy(), "float32", rounding.rotate))
        h = torch.from_numpy(rotate(rotate(h.numpy(), rounding.rotate).T, rounding.rotate)).double()
    mean = h.diagonal().mean()
    h.diagonal().add_(_DAMPING * mean if mean else 1)  # there may have been nothing but zeros
    importance = h.diagonal().clone()
    # Row k of this: by how much the inputs behind k make up for an error in k, times that of k itself.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    del h
    k = w.shape[1]
    columns = w.T.clone(memory_format=torch.contiguous_format)  # which are changed
    del w
    rounded = [_round_span(columns, span, importance, inverse, rounding) for span in rounding.spans(k)]
    arrays = {
        name: np.concatenate([getattr(part, name) for part in rounded], axis=1)
        for name in ("codes", "scales", "zps", "offsets", "sub_scales", "sub_offsets")
        if getattr(rounded[0], name) is not None
    }
    return QuantizedWeight(**arrays, rotation=rounding.rotate, group_size=min(rounding.group_size, k))


def _round_span(
    w: torch.Tensor, span: slice, importance: torch.Tensor, inverse: torch.Tensor, rounding: Rounding
) -> QuantizedWeight:
    """The inputs of one group, or of groups that share floats. What they lose is taken from all inputs behind them."""
    plain = replace(rounding, rotate=0)
    found = plain.quantize(w[span].T.contiguous().numpy(), "float32", importance[span].numpy())
    group = found.group_size or 1
    # One of each for a group, whatever the levels.
    _, scales, zps, *rest = (torch.from_numpy(np.ascontiguousarray(each.T)) for each in found.pack().unpack())
    offsets = rest[0] if rest else torch.zeros_like(scales)
    codes = torch.empty(w[span].shape, dtype=torch.uint8)
    for start in range(span.start, span.stop, _COLUMNS):
        stop = min(start + _COLUMNS, span.stop)
        errors = torch.empty(stop - start, w.shape[1])
        for k in range(start, stop):
            g = (k - span.start) // group
            scale = torch.where(scales[g] == 0, torch.ones(()), scales[g])
            code = ((w[k] - offsets[g]) / scale).round_().add_(zps[g]).clamp_(0, 15)
            codes[k - span.start] = code
            error = (w[k] - ((code - zps[g]) * scales[g] + offsets[g])) / inverse[k, k]
            w[k + 1 : stop] -= torch.outer(inverse[k, k + 1 : stop], error)
            errors[k - start] = error
        w[stop:] -= inverse[start:stop, stop:].T @ errors
    return replace(found, codes=np.ascontiguousarray(codes.T.numpy()))
