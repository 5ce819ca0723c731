"""What quantizers of quality.py learn from sentences: what inputs of matrices are like, and weights rounded by them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sentence_model import MATRICES, SentenceModel

import pyda8w4


def importance(model: SentenceModel, sentences: Sequence[str]) -> list[np.ndarray]:
    """The mean square of each input of each matrix."""
    sums = [np.zeros(w.shape[1]) for w in model.matrices]

    def product(w: np.ndarray, total: np.ndarray, x: np.ndarray) -> np.ndarray:
        total += np.square(x, dtype=float).sum(axis=0)
        return x @ w.T

    products = [partial(product, *pair) for pair in zip(model.matrices, sums)]
    for sentence in sentences:
        model.embed(sentence, products)
    return sums


def calibrated(
    folder: Path, model: SentenceModel, sentences: Sequence[str], group_size: int, how: dict[str, Any]
) -> list[pyda8w4.PackedWeight]:
    """The matrices of transformers' model, after `pyda8w4.torch.calibrate`. ImportError without torch."""
    import torch
    from transformers import BertModel

    import pyda8w4.torch

    bert = BertModel.from_pretrained(folder).eval()
    batches = [torch.tensor([model.tokenizer.encode(sentence).ids]) for sentence in sentences]
    pyda8w4.torch.calibrate(bert, batches, group_size, filter_fn=lambda module, name: "encoder.layer" in name, **how)
    return [layer.get_submodule(name).packed for layer in bert.encoder.layer for name in MATRICES]
