"""What `explain` says: of the plan, of the limits of the machine, and of the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

import pyda8w4
from pyda8w4 import _explain, _limits, _timing
from pyda8w4.__main__ import main
from pyda8w4._limits import Limits

READ, DOTS = 20.0, 400.0  # GB/s and GOPS of the machine of these tests


def weight(n=64, k=1024, group=128, zp=8):
    codes, groups = np.zeros((n, k), np.uint8), -(-k // group)
    return pyda8w4.prepack(codes, np.ones((n, groups), np.float32), np.full((n, groups), zp), group_size=group)


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    """Calls of `measure`, which here takes no time; the file with the limits is not there yet."""
    calls = []

    def measure(kernel, threads):
        calls.append((kernel, threads))
        return Limits(READ, DOTS)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_limits, "measure", measure)
    monkeypatch.setattr(_explain, "_SECONDS", 0.001)
    monkeypatch.setattr(_timing, "_MAX_COLD_BYTES", 1 << 20)
    return calls


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pyda8w4" / "limits.json"


# ---- the plan --------------------------------------------------------------------------------


def test_it_says_what_every_kernel_does(kernel):
    packed = weight()
    one = pyda8w4.explain(packed, threads=1)
    assert (one.n, one.k, one.m, one.act, one.kernel) == (64, 1024, 1, "uint8", kernel)
    assert (one.form, one.tile_rows, one.row_block, one.row_blocks, one.k_block) == ("packed", 1, 1, 1, 1024)
    assert (one.threads, one.most_threads) == (1, 1)
    assert one.multiplied_by == (("avx512vnni",) if kernel == "amx" else (kernel,))
    many = pyda8w4.explain(packed, 288)
    assert many.form == ("packed" if kernel == "scalar" else "unpacked")
    assert many.multiplied_by == (kernel,)
    assert (many.row_block, many.row_blocks) == (144, 2)
    for found in (one, many):
        assert found.path == ("general" if kernel == "scalar" else "fast")
        assert found.weight_bytes == packed.nbytes
        assert found.ms_q1 <= found.ms <= found.ms_q3


def test_it_says_why_better_kernels_are_not_run(kernel):
    better = pyda8w4.kernels(runnable=False)
    better = better[: better.index(kernel)]
    found = pyda8w4.explain(weight(), threads=1).reasons[: len(better)]
    for name, reason in zip(better, found, strict=True):
        lacking = pyda8w4.cpu_info()["kernels"][name]
        why = f"cannot run here: {lacking}" if lacking else "can run here, but another kernel is forced"
        assert reason == f"{name} {why}"


@pytest.mark.parametrize(
    ("options", "m", "path", "reason"),
    [
        ({"group": 20}, 1, "general", "all of the weight is on the general path: the group is no multiple of 16 k"),
        ({"group": 512}, 1, "general", "all of the weight is on the general path: the group is longer than 256 k"),
        ({"zp": -128}, 1, "fast", None),
        ({"zp": -128}, 97, "general", "all of the weight is on the general path: zero points leave value - zp no room"),
        ({"k": 4112}, 1, "99.6% fast", "0.4% of the weight is on the general path: the last group of k is shorter"),
    ],
)
def test_it_says_why_not_the_fast_path(options, m, path, reason):
    if "avx512vnni" not in pyda8w4.kernels():
        pytest.skip("this CPU cannot run avx512vnni")
    with pyda8w4.use_kernel("avx512vnni"):
        found = pyda8w4.explain(weight(**options), m, threads=1)
    assert found.path == path
    assert found.reasons[1:] == () if reason is None else found.reasons[1].startswith(reason)


def test_it_says_what_amx_leaves_to_avx512vnni():
    if "amx" not in pyda8w4.kernels():
        pytest.skip("this CPU cannot run amx")
    with pyda8w4.use_kernel("amx"):
        found = pyda8w4.explain(weight(), 12, threads=1)
        assert found.reasons[0].startswith("all of the weight is left to avx512vnni: few rows ")
        found = pyda8w4.explain(weight(zp=-128), 17, threads=1)
        assert found.reasons[0].startswith("all of the weight is left to avx512vnni, on the general path: zero points ")


def test_it_says_that_a_product_is_too_small_for_all_threads():
    found = pyda8w4.explain(weight(), threads=4)
    assert (found.threads, found.most_threads) == (1, 4)
    assert found.reasons[-1] == "1 of 4 threads work: the product is too small for more"
    found = pyda8w4.explain(weight(), 64, threads=4)
    assert found.threads == 4
    assert "threads" not in "".join(found.reasons)


# ---- the limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "act", "products"), [(1, "uint8", 1), (64, "int8", 64), (64, "int16", 128)])
def test_the_limit_that_binds_takes_longer(m, act, products):
    packed = weight()
    found = pyda8w4.explain(packed, m, act=act)
    assert (found.read_limit, found.dots_limit) == (READ, DOTS)
    assert found.operations == 2 * products * 64 * 1024
    assert found.read_ms == pytest.approx(1e3 * packed.nbytes / (READ * 1e9))
    assert found.dots_ms == pytest.approx(1e3 * found.operations / (DOTS * 1e9))
    assert found.limit == ("read" if m == 1 else "dots")
    assert found.of_limit == pytest.approx(max(found.read_ms, found.dots_ms) / found.ms)


def test_it_is_an_immutable_text():
    found = pyda8w4.explain(weight(group=20), 3, threads=1)
    with pytest.raises(FrozenInstanceError):
        found.kernel = "abacus"
    lines = dict(line.split(maxsplit=1) for line in str(found).splitlines())
    assert lines["product"] == "M = 3, N = 64, K = 1024, x as uint8"
    assert lines["kernel"] == found.kernel
    assert lines["threads"] == "1 of 1"
    assert lines["read"] == f"{found.read_ms:.3g} ms at 20.0 GB/s"
    assert lines["limit"].endswith(f"of which {found.of_limit:.0%} are reached")
    assert lines["because"] == found.reasons[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"packed": np.zeros(3)}, TypeError, "packed must be a PackedWeight, got ndarray"),
        ({"m": 1.0}, TypeError, "m must be an int, got float"),
        ({"m": True}, TypeError, "m must be an int, got bool"),
        ({"m": 0}, ValueError, "m must be at least 1, got 0"),
        ({"act": 8}, TypeError, "act must be 'uint8', 'int8', 'int8_group' or 'int16', got int"),
        ({"act": "int4"}, ValueError, "act must be 'uint8', 'int8', 'int8_group' or 'int16', got 'int4'"),
        ({"threads": "2"}, TypeError, "threads must be an int or None, got str"),
        ({"threads": 0}, ValueError, "threads must be 1 to 65536, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message, measured):
    with pytest.raises(error) as caught:
        pyda8w4.explain(**{"packed": weight(), **arguments})
    assert str(caught.value).partition("; ")[0] == message
    assert not measured


def test_a_kernel_of_the_environment_that_cannot_run(monkeypatch):
    def refuse(*arguments):
        raise _explain._core.CoreError("UNKNOWN_KERNEL", "")

    class Packed:
        _view = type("View", (), {"explain": refuse})

    monkeypatch.setenv("PYDA8W4_KERNEL", "sse9")
    with pytest.raises(ValueError, match="PYDA8W4_KERNEL 'sse9' is not a kernel"):
        _explain._plan(Packed, 1, "uint8", 1)


@pytest.mark.slow
def test_limits_are_measured_with_every_kernel(kernel, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_limits, "_MIN_BYTES", 1 << 20)
    monkeypatch.setattr(_limits, "cold_bytes", lambda: 1 << 20)
    found = _limits.measure(kernel, 2)
    assert found.read > 0.01
    assert found.dots > 0.01


# ---- the file that keeps them ----------------------------------------------------------------


def test_limits_are_measured_once(measured, file):
    first = pyda8w4.explain(weight(), threads=1)
    assert measured == [(first.kernel, 1)]
    assert list(json.loads(file.read_text()).values()) == [{"read": READ, "dots": DOTS}]
    pyda8w4.explain(weight(group=32), 3, threads=1)
    assert len(measured) == 1


def test_others_are_measured_again(measured, monkeypatch):
    with pyda8w4.use_kernel("scalar"):
        pyda8w4.explain(weight(), threads=1)
        pyda8w4.explain(weight(), threads=2)
    monkeypatch.setattr(_limits, "cpu_model", lambda: "another CPU")
    for _ in range(2):
        with pyda8w4.use_kernel("scalar"):
            pyda8w4.explain(weight(), threads=1)
    monkeypatch.setattr(_limits, "version", lambda: "99.0.0")
    with pyda8w4.use_kernel("scalar"):
        pyda8w4.explain(weight(), threads=1)
    assert measured == [("scalar", 1), ("scalar", 2), ("scalar", 1), ("scalar", 1)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe",
        lambda text: b"[1, 2]",
        lambda text: text.replace(b"20.0", b"-20.0"),
        lambda text: text.replace(b"20.0", b'"20.0"'),
        lambda text: text.replace(b"20.0", b"NaN"),
        lambda text: text.replace(b"20.0", b"Infinity"),
        lambda text: text.replace(b'"read"', b'"write"'),
        lambda text: json.dumps(dict.fromkeys(json.loads(text), 5)).encode(),
        lambda text: b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_written_anew(damage, measured, file):
    pyda8w4.explain(weight(), threads=1)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    found = pyda8w4.explain(weight(), threads=1)
    assert (found.read_limit, found.dots_limit) == (READ, DOTS)
    assert len(measured) == 2
    assert file.read_bytes() == good


def test_a_file_that_cannot_be_written_is_no_error(measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert pyda8w4.explain(weight(), threads=1).read_limit == READ
    assert len(measured) == 2


def test_a_user_without_a_home(measured, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert pyda8w4.explain(weight(), threads=1).read_limit == READ


# ---- the command -----------------------------------------------------------------------------


def test_the_command_prints_a_row_for_each_m_and_the_reasons(capsys, measured):
    options = "--m 1,30 --group-size 20 --bits 5 --act int8 --threads 1 --kernel scalar"
    assert main(["explain", "64", "96", *options.split()]) == 0
    header, table, reasons = capsys.readouterr().out.split("\n\n")
    assert "\nlayer    64 x 96, 5 bits, groups of 20, x as int8; packed " in header
    assert "\nkernel   scalar, up to 1 thread\n" in header
    assert "\nlimits   read 20.0 GB/s, dot products 400 GOPS\n" in header
    _, *rows = table.splitlines()
    assert [row.split()[:4] for row in rows] == [[m, "scalar", "packed", "general"] for m in ("1", "30")]
    assert all(row.rstrip().endswith("%") for row in rows)
    assert reasons.splitlines()[0] == "why nothing faster is done"
    assert "  all of the weight is on the general path: scalar has one path for all weights" in reasons.splitlines()
    assert measured == [("scalar", 1)]


def test_reasons_of_some_rows_say_of_which(capsys):
    if "avx2" not in pyda8w4.kernels():
        pytest.skip("this CPU cannot run avx2")
    assert main(["explain", "64", "1024", "--m", "1,64", "--threads", "4", "--kernel", "avx2"]) == 0
    assert "\n  M = 1: 1 of 4 threads work: the product is too small for more\n" in capsys.readouterr().out
