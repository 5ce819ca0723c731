"""Importance matrices of llama.cpp, written here as its own programs lay them out."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyda8w4.checkpoints import read_imatrix

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

F32 = np.float32
SUMS = np.arange(12, dtype=F32).reshape(1, 12)
EXPERTS = np.arange(24, dtype=F32).reshape(3, 8)


def write_gguf(path: Path, tensors: dict[str, Any], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    for name, array in tensors.items():
        writer.add_tensor(name, np.asarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(sums: Any, counts: Any, name: str = "blk.0.a.weight") -> dict[str, Any]:
    return {f"{name}.in_sum2": sums, f"{name}.counts": np.asarray(counts, F32)[:, None]}


def legacy(*entries: tuple[bytes, int, Any]) -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += np.asarray(values, "<f4").tobytes()
    return data + struct.pack("<ii", 7, 8) + b"text.txt"


def test_gguf(tmp_path: Path) -> None:
    tensors = entry(SUMS, [4]) | entry(EXPERTS, [2, 0, 8], "blk.0.experts.weight")
    found = read_imatrix(write_gguf(tmp_path / "a.gguf", tensors))
    assert list(found) == ["blk.0.a.weight", "blk.0.experts.weight"]
    np.testing.assert_array_equal(found["blk.0.a.weight"], SUMS[0] / 4)
    np.testing.assert_array_equal(found["blk.0.experts.weight"], [EXPERTS[0] / 2, np.ones(8), EXPERTS[2] / 8])
    assert all(array.dtype == F32 for array in found.values())


def test_legacy(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(legacy((b"blk.0.a.weight", 4, SUMS[0]), (b"blk.0.b.weight", 0, [5, 5])))
    found = read_imatrix(path)
    np.testing.assert_array_equal(found["blk.0.a.weight"], SUMS[0] / 4)
    np.testing.assert_array_equal(found["blk.0.b.weight"], [1, 1])


@pytest.mark.parametrize(
    "tensors, message",
    [
        (entry(SUMS, [4, 4]), "a count for each of 1 matrices, got 2"),
        ({"a.in_sum2": SUMS}, "it has no 'a.counts'"),
        (entry(SUMS.astype(np.float16), [4]), "must be F32, got F16 and F32"),
        (entry(-SUMS, [4]), "must be finite, 0 or more"),
        (entry(np.full((1, 2), np.inf, F32), [4]), "must be finite, 0 or more"),
        (entry(SUMS, [np.nan]), None),
    ],
)
def test_gguf_that_is_none(tensors: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tensors)
    if message is None:  # a count that is no number is none
        assert (read_imatrix(path)["blk.0.a.weight"] == 1).all()
        return
    with pytest.raises(ValueError, match=message) as error:
        read_imatrix(path)
    assert str(path) in str(error.value)


def test_another_gguf(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"general\.type must be 'imatrix', got 'model'"):
        read_imatrix(write_gguf(tmp_path / "a.gguf", entry(SUMS, [4]), "model"))


def test_legacy_that_is_none(tmp_path: Path) -> None:
    good, path = legacy((b"blk.0.a.weight", 4, SUMS[0])), tmp_path / "a.dat"
    for size in (0, 3, 4, 8, 20, 26, 60):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="it ends too early"):
            read_imatrix(path)
    for data in (legacy(), legacy((b"", 1, [1])), legacy((b"a", 1, [])), struct.pack("<ii", 1, -1)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"it has (no tensors|a length of)"):
            read_imatrix(path)
    with pytest.raises(FileNotFoundError):
        read_imatrix(tmp_path / "b.dat")
    with pytest.raises(TypeError):
        read_imatrix(3)  # type: ignore[arg-type]
