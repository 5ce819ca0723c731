"""The embedding."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
from cases import KINDS, Weight, pack

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import FLOATS, MARKS, compiled, same

from pyda8w4.torch import DA8W4Embedding, DA8W4Linear

pytestmark = MARKS


def rows(weight: Weight, input: Any, dtype: Any) -> Any:
    """From the whole dequantized weight."""
    return nn.functional.embedding(input, torch.from_numpy(pack(weight).dequantize())).to(dtype)


@pytest.mark.parametrize("weight", KINDS, ids=str)
def test_rows(weight: Weight) -> None:
    input = torch.randint(0, weight.n, (2, 3))
    for dtype in FLOATS:
        embedding = DA8W4Embedding.from_packed(pack(weight), dtype=dtype)
        want = rows(weight, input, dtype)
        assert same(embedding(input), want) and same(embedding(input.int()), want)
        assert same(embedding(input.T), want.transpose(0, 1)) and same(embedding(input[0, 0]), want[0, 0])
        assert embedding(input[:, :0]).shape == (2, 0, weight.k)
        assert same(embedding.float()(input), rows(weight, input, torch.float32))
        weight_like = embedding.weight
        assert (weight_like.shape, weight_like.dtype) == ((weight.n, weight.k), torch.float32)


WEIGHT = Weight(40, 64, 32, "float16", bits=8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_of_gemma(dtype: Any) -> None:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3", reason="transformers is not installed")
    scale = 64**0.5 + 0.3
    other = gemma.Gemma3TextScaledWordEmbedding(40, 64, 0, scale)
    other.weight.copy_(torch.from_numpy(pack(WEIGHT).dequantize()))
    embedding = DA8W4Embedding.from_packed(pack(WEIGHT), scale=scale, dtype=dtype)
    input = torch.arange(40)
    assert same(embedding(input), copy.deepcopy(other).to(dtype)(input))
    assert same(embedding.to(torch.bfloat16)(input), other.bfloat16()(input))
    assert "scale=8.3" in repr(embedding)


def test_what_is_no_row() -> None:
    embedding = DA8W4Embedding.from_packed(pack(WEIGHT))
    for wrong in (-1, 40, 1 << 40, -(1 << 40)):
        with pytest.raises(IndexError, match=f"input must be 0 to 39, got .*{wrong}"):
            embedding(torch.tensor([0, wrong, 39]))
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16):
        with pytest.raises(TypeError, match="input must be int64 or int32"):
            embedding(torch.zeros(2, dtype=dtype))
    with pytest.raises(ValueError, match="dense tensor on the CPU"):
        embedding(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match="packed must be a PackedWeight"):
        DA8W4Embedding.from_packed(nn.Embedding(2, 4))
    for sizes in ((0, 4), (4, 0), (4, True), (4.0, 4)):
        with pytest.raises(ValueError, match="must be an int of at least 1"):
            DA8W4Embedding(*sizes)
    with pytest.raises(TypeError, match="scale must be a float"):
        DA8W4Embedding(4, 4, scale="2")


def test_permutation_that_was_changed_in_place() -> None:
    weight = Weight(8, 64, 32, perm=True)
    embedding = DA8W4Embedding.from_packed(pickle.loads(pickle.dumps(pack(weight))))
    embedding(torch.arange(8))
    for wrong in (64, -1):
        embedding.perm = embedding.perm.clone()
        embedding(torch.arange(8))
        embedding.perm[3] = wrong
        with pytest.raises(ValueError, match="perm must have each of 0 to 63"):
            embedding(torch.arange(8))
        embedding.perm[3] = 0


def test_buffers_that_do_not_fit() -> None:
    embedding = DA8W4Embedding.from_packed(pack(WEIGHT))
    embedding(torch.arange(3))
    embedding.scales = embedding.scales[:1]
    with pytest.raises(ValueError, match="scales must be"):
        embedding(torch.arange(3))


@pytest.mark.parametrize("weight", KINDS[:3] + KINDS[-3:], ids=str)
def test_state(weight: Weight) -> None:
    embedding = DA8W4Embedding.from_packed(pack(weight), scale=3.0)
    input = torch.arange(weight.n)
    want = embedding(input)
    empty = DA8W4Embedding(weight.n, weight.k, scale=3.0)
    empty.load_state_dict(embedding.state_dict(), strict=True)
    assert same(empty(input), want)
    buffer = io.BytesIO()
    torch.save(embedding, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(embedding), torch.load(buffer, weights_only=False)):
        assert same(other(input), want) and other.codes.data_ptr() != embedding.codes.data_ptr()
    linear = DA8W4Linear.from_packed(embedding.packed)
    assert linear.codes.data_ptr() == embedding.codes.data_ptr()
    linear.load_state_dict(embedding.state_dict())
    with pytest.raises(RuntimeError, match="layout must have N"):
        DA8W4Embedding(weight.n + 1, weight.k).load_state_dict(embedding.state_dict())


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype: Any) -> None:
    embedding = DA8W4Embedding.from_packed(pack(WEIGHT))
    weight = [embedding.codes, embedding.scales, embedding.sums, embedding.zps]
    for input in (torch.tensor([[3, 1, 39]]), torch.tensor(3, dtype=torch.int32)):
        torch.library.opcheck(torch.ops.pyda8w4.embedding, (input, weight, embedding.layout.tolist(), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(dtype: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = DA8W4Embedding.from_packed(pack(WEIGHT), scale=1.7, dtype=dtype)
            self.head = DA8W4Linear.from_packed(self.embedding.packed, dtype=dtype)

        def forward(self, input: Any) -> Any:
            return self.head(self.embedding(input))

    model, input = Model().eval(), torch.arange(6).reshape(2, 3)
    out, code, function = compiled(model, input)
    assert same(out, model(input)) and "torch.ops.pyda8w4.embedding" in "".join(code)
    assert same(function(input[:1]), model(input[:1]))
    exported = torch.export.export(model, (input,))
    assert same(exported.module()(input), model(input))


def test_keeps_its_weight() -> None:
    embedding = DA8W4Embedding.from_packed(pack(WEIGHT))
    with pytest.warns(UserWarning, match="a DA8W4Embedding keeps its packed weight"):
        embedding.weight = nn.Parameter(torch.zeros(40, 64))
    with pytest.raises(NotImplementedError, match="DA8W4Embedding"):
        torch.jit.script(embedding)
    assert np.shares_memory(embedding.packed._arrays["codes"], embedding.codes.numpy())
