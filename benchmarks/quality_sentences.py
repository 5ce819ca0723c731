"""How far sentence embeddings with other weights or activations are from those in float32."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from calibration import calibrated, importance
from onnxruntime_layers import OnnxLayer, quantizers
from quality_tables import Row, Table
from quantizers import CALIBRATED, GROUPS, QUANTIZERS, RECOMMENDED, signal_to_noise
from sentence_model import Product, SentenceModel, find_model

import pyda8w4

TOP = 10

COLUMNS = {
    "weights": "",
    "groups of": "d",
    "activations": "",
    "bits": ".2f",
    "SQNR, dB": ".2f",
    "1000 x (1 - cosine)": ".3f",
    "the worst": ".2f",
    "1000 x similarity": ".2f",
    f"same {TOP} neighbours, %": ".1f",
}


def sentence_table(name: str, sentences: Sequence[str], others: Sequence[str]) -> Table:
    """Of sentences; from others, quantizers may learn."""
    model = SentenceModel(find_model())

    def embed(products: Sequence[Product]) -> np.ndarray:
        return np.array([model.embed(sentence, products) for sentence in sentences])

    exact = embed([partial(dense, w) for w in model.matrices])
    rows: list[Row] = [{"weights": "float32", "activations": "float32"}]
    for row, products in sentence_rows(model, others):
        rows.append({**row, **compare_embeddings(exact, embed(products))})
    return Table(f"{name}, {len(sentences)} sentences", COLUMNS, rows, "1000 x (1 - cosine)")


def compare_embeddings(exact: np.ndarray, found: np.ndarray) -> Row:
    """Both are rows of length 1; similarities are the cosines of all pairs of them."""
    lost = 1 - np.sum(exact * found, axis=1, dtype=float)
    pairs, found_pairs = (np.asarray(each, float) @ np.asarray(each, float).T for each in (exact, found))
    others = ~np.eye(len(exact), dtype=bool)
    return {
        "1000 x (1 - cosine)": float(1000 * lost.mean()),
        "the worst": float(1000 * lost.max()),
        "1000 x similarity": float(1000 * np.sqrt(np.mean((pairs - found_pairs)[others] ** 2))),
        f"same {TOP} neighbours, %": float(100 * overlap(pairs, found_pairs, TOP)),
    }


def overlap(exact: np.ndarray, found: np.ndarray, top: int) -> float:
    """The share of the `top` nearest others of each row that are the same by both matrices of similarities."""
    nearest = []
    for pairs in (exact, found):
        pairs = pairs.copy()
        np.fill_diagonal(pairs, -np.inf)
        nearest.append(np.argpartition(-pairs, top - 1, axis=1)[:, :top])
    return float(np.mean([np.isin(a, b) for a, b in zip(*nearest)]))


# ---- rows --------------------------------------------------------------------------------------


def sentence_rows(model: SentenceModel, others: Sequence[str]) -> Iterator[tuple[Row, list[Product]]]:
    matrices = model.matrices
    start = time.perf_counter()
    for label, group, packed in packed_matrices(model, others):
        print(f"{label}, groups of {group}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
        size = sizes(matrices, [each.nbytes for each in packed], [each.dequantize() for each in packed])
        for act in ("int16", "uint8", "int8_group") if label == RECOMMENDED else ("int16",):
            row = {"weights": label, "groups of": group, "activations": act, **size}
            yield row, [partial(rounded, each, act) for each in packed]
        start = time.perf_counter()
    for row, quantize in quantizers():
        layers = [OnnxLayer(quantize, w) for w in matrices]
        size = sizes(matrices, [each.nbytes for each in layers], [each.dequantize() for each in layers])
        yield {**row, **size}, layers


def packed_matrices(
    model: SentenceModel, others: Sequence[str]
) -> Iterator[tuple[str, int, list[pyda8w4.PackedWeight]]]:
    """Each quantizer and size of groups, and what becomes of the matrices."""
    for label, how in QUANTIZERS.items():
        for group in GROUPS:
            yield label, group, [pyda8w4.quantize(w, group, **how) for w in model.matrices]
    counts = importance(model, others)
    for group in GROUPS:
        packed = [pyda8w4.quantize(w, group, importance=each) for w, each in zip(model.matrices, counts)]
        yield "search, offsets, importance", group, packed
    for label, how in CALIBRATED.items():
        for group in GROUPS:
            try:
                yield label, group, calibrated(find_model(), model, others, group, how)
            except ImportError:
                return


def sizes(matrices: Sequence[np.ndarray], nbytes: Sequence[int], rounded: Sequence[np.ndarray]) -> Row:
    return {
        "bits": 8 * sum(nbytes) / sum(w.size for w in matrices),
        "SQNR, dB": np.mean([signal_to_noise(*pair) for pair in zip(matrices, rounded)]),
    }


def dense(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x @ w.T


def rounded(packed: pyda8w4.PackedWeight, act: str, x: np.ndarray) -> np.ndarray:
    return pyda8w4.linear(x, packed, act=act)
