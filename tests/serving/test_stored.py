"""Tensors that stand for weights in a checkpoint are, to whoever does not know, the floats; views are told apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pyda8w4
from pyda8w4.vllm._stored import Source, Stored

E, N, K = 3, 64, 32
_RNG = np.random.default_rng(0)
_PACKED = [pyda8w4.prepack(_RNG.integers(0, 16, (N, K), np.uint8), np.ones(N, np.float32)) for _ in range(E)]
_FLOATS = np.stack([packed.dequantize() for packed in _PACKED])


def _stack(dtype: torch.dtype = torch.float32) -> Stored:
    return Stored.of(Source("experts", (E, N, K), _PACKED.__getitem__, lambda: _FLOATS), dtype)


View = Callable[[torch.Tensor], torch.Tensor]

# And which matrix and rows it is.
VIEWS: dict[str, tuple[View, tuple[int, slice] | None]] = {
    "all": (lambda w: w, None),
    "matrix": (lambda w: w[1], (1, slice(0, N))),
    "unbind": (lambda w: w.unbind()[2], (2, slice(0, N))),
    "chunk": (lambda w: w.chunk(2, dim=1)[1].unbind()[1], (1, slice(N // 2, N))),
    "narrow": (lambda w: w[2].narrow(0, 8, 16), (2, slice(8, 24))),
    "unsqueeze": (lambda w: w[0].unsqueeze(0).unbind()[0], (0, slice(0, N))),
    "split": (lambda w: w[0].split([48, 16])[1], (0, slice(48, 64))),
    "of_a_view": (lambda w: w[1][16:][8:16], (1, slice(24, 32))),
    "columns": (lambda w: w[1][:, 4:], None),
    "few_columns": (lambda w: w[1][:, :4], None),
    "transposed": (lambda w: w[1].t(), None),
    "every_second_row": (lambda w: w[1][::2], None),
    "row": (lambda w: w[1][5], None),
    "two_matrices": (lambda w: w.reshape(E * N, K)[32:96], None),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view(name: str) -> None:
    view, place = VIEWS[name]
    found, floats = view(_stack()), view(torch.from_numpy(_FLOATS))
    assert isinstance(found, Stored)
    assert found.shape == floats.shape and found.dtype is floats.dtype and found.is_cpu
    assert found.matrix() == place
    assert torch.equal(found + 0, floats)


def test_numbers_where_they_are_needed() -> None:
    stored, floats = _stack(), torch.from_numpy(_FLOATS)
    parameter = torch.nn.Parameter(torch.empty(N, K), requires_grad=False)
    parameter.data.copy_(stored[1])
    assert torch.equal(parameter, floats[1])
    assert torch.equal(torch.empty(N, K).copy_(stored[2]), floats[2])
    assert torch.equal(stored.permute(0, 2, 1).contiguous(), floats.permute(0, 2, 1))
    assert torch.equal(torch.cat([stored[0], stored[1]]), torch.cat([floats[0], floats[1]]))


def test_type() -> None:
    stored = _stack(torch.bfloat16)
    assert stored.dtype is torch.bfloat16 and stored.floats().dtype is torch.bfloat16
    assert torch.equal(stored.floats(), torch.from_numpy(_FLOATS).bfloat16())


def test_nothing_is_read_before() -> None:
    def read() -> np.ndarray:
        raise AssertionError

    stored = Stored.of(Source("w", (N, K), lambda index: read(), read), torch.float32)
    part = stored.chunk(2)[1].unsqueeze(0)[0]
    assert repr(part) == "Stored('w', shape=(32, 32))"
    with pytest.raises(AssertionError):
        part.clone()
