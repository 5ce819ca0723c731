"""The commands of ``pyda8w4`` and ``python -m pyda8w4``, as a user runs them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import pyda8w4
import pyda8w4.checkpoints
from pyda8w4 import _timing, bench, reference, selftest
from pyda8w4.__main__ import main
from pyda8w4._format import Format
from pyda8w4._safetensors import Tensor
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.formats import QuantizedWeight
from pyda8w4.formats._layer import Layer, plain_layer

SVG = "{http://www.w3.org/2000/svg}"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyda8w4", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYDA8W4_KERNEL": "", **environment},
    )


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(selftest, "_SHAPES", [(1, 1, 1, 1), (5, 33, 39, 12), (17, 32, 64, 32)])


@pytest.fixture
def quick_bench(monkeypatch):
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(_timing, "_MAX_COLD_BYTES", 1 << 20)


# ---- info ------------------------------------------------------------------------------------


def test_info_names_version_cpu_and_kernels():
    result = run("info")
    assert (result.returncode, result.stderr) == (0, "")
    assert pyda8w4.__version__ in result.stdout
    assert pyda8w4.cpu_info()["cpu"] in result.stdout
    for name in pyda8w4.kernels(runnable=False):
        assert f"  {name} " in result.stdout
    assert result.stdout.count("cannot run here") == len(pyda8w4.kernels(runnable=False)) - len(pyda8w4.kernels())


def test_info_as_json_has_what_a_bug_report_needs():
    result = run("info", "--json", PYDA8W4_KERNEL="scalar")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["pyda8w4"], found["numpy"], found["kernel"]) == (pyda8w4.__version__, np.__version__, "scalar")
    assert found["environment"]["PYDA8W4_KERNEL"] == "scalar"
    assert found["kernels"] == pyda8w4.cpu_info()["kernels"]


def test_info_says_that_the_environment_chose_the_kernel():
    assert "scalar (PYDA8W4_KERNEL)" in run("info", PYDA8W4_KERNEL="scalar").stdout


@pytest.mark.parametrize("command", [["info"], ["selftest"], ["bench"], ["explain", "64", "64"]])
def test_an_unknown_kernel_in_the_environment_is_one_line(command):
    result = run(*command, PYDA8W4_KERNEL="sse9")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "PYDA8W4_KERNEL 'sse9'" in result.stderr.splitlines()[-1]


# ---- selftest --------------------------------------------------------------------------------


def test_selftest_of_one_kernel():
    result = run("selftest", "--kernel", pyda8w4.kernels()[0])
    assert (result.returncode, result.stderr) == (0, "")
    first, *_, last = result.stdout.splitlines()
    assert first.split()[:2] == [pyda8w4.kernels()[0], "bit-identical"]
    assert last.startswith("OK: 1 kernel ")


def test_selftest_covers_every_kernel(few_shapes, capsys):
    results = selftest.run()
    assert [result.kernel for result in results] == pyda8w4.kernels(runnable=False)
    for result in results:
        assert result.difference is None
        assert (result.cases > 0) == (result.kernel in pyda8w4.kernels()) == (result.reason is None)
        assert (result.digest is None) == (result.cases == 0)
    assert len({result.digest for result in results if result.cases}) == 1
    assert main(["selftest"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(results) + 1


@pytest.mark.parametrize("function", ["quantize_activation", "gemm", "linear", "linear_gated", "moe"])
def test_selftest_notices_one_wrong_bit(function, few_shapes, monkeypatch, capsys):
    right = getattr(reference, function)

    def off_by_one_bit(*args, **options):
        y = right(*args, **options)
        first = y[0] if isinstance(y, tuple) else y
        first.reshape(-1)[-1:].view(f"u{first.itemsize}")[0] ^= 1
        return y

    monkeypatch.setattr(reference, function, off_by_one_bit)
    assert main(["selftest", "--kernel", "scalar"]) == 1
    out = capsys.readouterr().out
    assert f"DIFFERS in case {function} " in out
    assert out.splitlines()[-1] == "FAILED: scalar differs from the reference"


@pytest.mark.parametrize("function", ["linear", "linear_gated", "grouped_linear", "moe"])
def test_selftest_notices_a_kernel_that_goes_wrong(function, few_shapes, monkeypatch):
    right = getattr(selftest, function)

    def wrong_in_the_last_column(*args, **options):
        y = right(*args, **options)
        y[..., -1] += np.ones((), y.dtype)
        return y

    monkeypatch.setattr(selftest, function, wrong_in_the_last_column)
    assert all(result.difference for result in selftest.run() if not result.reason)


def test_selftest_without_ml_dtypes_says_what_it_left_out(few_shapes, monkeypatch, capsys):
    monkeypatch.setattr(selftest, "_float_types", lambda: ("float32", "float16"))
    assert selftest.main("scalar") == 0
    assert "bfloat16 inputs and outputs were not checked" in capsys.readouterr().out


def test_selftest_run_refuses_unknown_kernels():
    with pytest.raises(ValueError, match=r"kernel must be one of .*scalar, got 'sse9'"):
        selftest.run("sse9")


# ---- bench -----------------------------------------------------------------------------------


def test_bench_prints_a_row_for_each_cell_and_writes_json(tmp_path, quick_bench, capsys):
    path = tmp_path / "bench.json"
    options = ["--shapes", "64x96,33x50", "--m", "1,5", "--group-size", "32", "--seconds", "0.02", "--kernel", "scalar"]
    assert main(["bench", *options, "--json", str(path)]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [row.split()[:2] for row in table[1::2]] == [["64x96", "1"], ["33x50", "1"]]
    found = json.loads(path.read_text())
    assert (found["kernel"], found["group_size"]) == ("scalar", 32)
    assert [(cell["n"], cell["k"], cell["m"]) for cell in found["cells"]] == [
        (64, 96, 1),
        (64, 96, 5),
        (33, 50, 1),
        (33, 50, 5),
    ]
    for cell in found["cells"]:
        assert cell["numpy_read"] > 0
        assert cell["packed_copies"] * cell["packed_bytes"] >= found["rotated_bytes"]
        for side in ("linear_ms", "float32_ms"):
            assert 0 < cell[side]["q1"] <= cell[side]["median"] <= cell[side]["q3"]
            assert cell[side]["samples"] >= 3
        assert cell["ratio"] == pytest.approx(cell["float32_ms"]["median"] / cell["linear_ms"]["median"])
        assert cell["gops"] == pytest.approx(2 * cell["m"] * cell["n"] * cell["k"] / cell["linear_ms"]["median"] / 1e6)


def test_bench_draws_a_line_for_each_layer_and_side(tmp_path, quick_bench, monkeypatch):
    cells = [
        bench.Cell(n, 64, m, 1, 1, 1, 1.0, _timing.Spread(n * m, 1, 1, 3), _timing.Spread(4 * n * m, 1, 1, 3))
        for n in (1, 2)
        for m in (1, 10, 100)
    ]
    monkeypatch.setattr(bench, "measure_layer", lambda n, *others: [cell for cell in cells if cell.n == n])
    path = tmp_path / "bench.svg"
    assert main(["bench", "--shapes", "1x64,2x64", "--m", "1,10,100", "--kernel", "scalar", "--plot", str(path)]) == 0
    picture = ElementTree.parse(path).getroot()
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts[0] == "linear beside numpy float32: 4 bits, groups of 128, x as uint8"
    assert "scalar" in texts[1]
    assert {"rows M", "milliseconds of a product"} < set(texts)
    assert texts[-4:] == ["1 x 64", "1 x 64, numpy", "2 x 64", "2 x 64, numpy"]
    lines = [line for line in picture.iter(f"{SVG}polyline") if line.get("stroke-width") == "1.5"]
    drawn = [[tuple(map(float, place.split(","))) for place in line.get("points").split()] for line in lines[:4]]
    # Ten times as many rows take ten times as long: straight lines, which are as far apart as twice the time is.
    for line in drawn:
        (x1, y1), (x2, y2), (x3, y3) = line
        assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
        assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
        assert x1 < x2 and y1 > y2
    first, numpy, second, _ = (line[0][1] for line in drawn)
    assert first - numpy == pytest.approx(2 * (first - second), abs=0.3) != 0
    assert len({line.get("stroke") for line in lines}) == 2


def test_bench_as_a_process():
    result = run("bench", "--shapes", "512x1024", "--m", "1", "--seconds", "0.01", "--threads", "1")
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 thread" in result.stdout
    assert "\n512x1024 " in result.stdout


def test_bench_prints_each_row_as_soon_as_it_is_measured():
    rows = 20  # fewer bytes than a pipe's buffer, so that none of them comes before the end unless it is flushed
    command = [sys.executable, "-m", "pyda8w4", "bench", "--shapes", "32x64", "--m", ",".join("1" * rows)]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        [*command, "--seconds", "0.01"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if line.startswith("32x64 "):
                break
        process.kill()
        assert process.stdout.read().count("\n") < rows - 1


def test_bench_says_before_the_table_how_long_it_takes_and_what_the_columns_mean(quick_bench, capsys):
    assert main(["bench", "--shapes", "64x96,33x50", "--m", "1,2,5", "--seconds", "0.02"]) == 0
    header, _, table = capsys.readouterr().out.partition("\nN x K")
    assert "of read" in table
    assert "\nof read  " in header
    assert "\ntime     0 s or more: 6 cells of 0.0 s, " in header


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_bench_times_the_same_layer_on_both_sides(bits):
    packed, w = bench._random_layer(np.random.default_rng(0), 40, 300, 128, bits)
    assert packed.bits == bits
    codes, scales, zps = packed.unpack()
    each = [np.repeat(array, 128, axis=1)[:, :300] for array in (scales, zps)]
    np.testing.assert_array_equal(w, (codes.astype(np.float32) - each[1]) * each[0])


# ---- inspect and convert ---------------------------------------------------------------------


def matrix(experts=0, type="GPTQ 4-bit"):
    """64 x 128, in groups of 32: 4.75 bits in memory."""
    weight = QuantizedWeight(np.full((64, 128), 9, np.uint8), np.full((64, 4), 0.5, np.float16))
    shape = (experts, 64, 128) if experts else (64, 128)
    format = Format(64, 128, 32, "float16", zero_point=8)
    return Layer(type, shape, 64 * 128 * 5 // 8 * (experts or 1), (), read=lambda index: weight, format=format)


def plain(name, *shape):
    return plain_layer(Tensor(name, Path("somewhere"), "F32", shape, np.zeros(4 * int(np.prod(shape)), np.uint8)))


def refused(why="it is of axis 0"):
    def floats(index):
        return np.random.default_rng(index).standard_normal((32, 64), np.float32)

    return Layer("HQQ 4-bit", (32, 64), 1280, (), floats=floats, refusal=why)


@pytest.fixture
def checkpoint(monkeypatch):
    """What every path is opened as."""
    layers = {}
    for i in range(3):
        layers[f"model.layers.{i}.mlp.down_proj"] = matrix()
        layers[f"model.layers.{i}.mlp.experts"] = matrix(experts=2, type="MXFP4")
        layers[f"model.layers.{i}.norm.weight"] = plain(f"model.layers.{i}.norm.weight", 64)
    layers["embed.weight"] = plain("embed.weight", 10, 64)
    found = Checkpoint(Path("somewhere"), {"architectures": ["LlamaForCausalLM"]}, layers)
    monkeypatch.setattr(pyda8w4.checkpoints, "open", lambda path: found)
    return found


def test_inspect_prints_what_is_in_a_checkpoint(checkpoint, capsys):
    assert main(["inspect", "somewhere"]) == 0
    assert (
        capsys.readouterr().out
        == """\
checkpoint  somewhere
format      GGUF
model       LlamaForCausalLM
tensors     10, 74,560 parameters
in files    49.41 kB
packed      47.10 kB

stored as   tensors  parameters   bits  packed
GPTQ 4-bit        3      24,576   5.00    4.75  packed exactly
MXFP4             3      49,152   5.00    4.75  packed exactly
F32               4         832  32.00   32.00  left as they are

packed exactly:
  model.layers.*.mlp.down_proj  3  64 x 128      GPTQ 4-bit
  model.layers.*.mlp.experts    3  2 x 64 x 128  MXFP4

left as they are:
  model.layers.*.norm.weight  3  64       F32
  embed.weight                1  10 x 64  F32
"""
    )


def test_inspect_says_what_is_refused_and_why(checkpoint, capsys):
    for i in range(12):
        checkpoint._layers[f"model.layers.{i}.o"] = refused(f"model.layers.{i}.o.W_q is of axis 0")
    assert main(["inspect", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert "\npacked      47.10 kB, without 12 that are refused\n" in out
    assert "\nHQQ 4-bit        12      24,576   5.00          refused\n" in out
    assert out.endswith("\nrefused:\n  model.layers.*.o  12  32 x 64  HQQ 4-bit  model.layers.*.o.W_q is of axis 0\n")


def test_inspect_reads_no_tensor(checkpoint, capsys):
    def read(index):
        raise AssertionError

    checkpoint._layers = {name: replace(layer, read=read) for name, layer in checkpoint._layers.items()}
    assert main(["inspect", "somewhere"]) == 0


HOSTILE = "w\x1b]0;title\x07\x1b[2J\r\n\x9b31m\u202e\ud800\u20ac" + "x" * 1000


@pytest.mark.pitfall("general", "terminal escape sequences in names")
def test_names_and_reasons_cannot_command_a_terminal(checkpoint, capsys):
    checkpoint._layers[HOSTILE] = replace(refused(HOSTILE), type=HOSTILE)
    checkpoint.metadata["architectures"] = HOSTILE
    assert main(["inspect", "somewhere"]) == 0
    assert main(["convert", "somewhere", "out.safetensors"]) == 1
    checkpoint._layers = {HOSTILE.replace("\ud800", ""): replace(matrix(), read=warn_of_hostile)}
    assert main(["convert", "somewhere", "out.safetensors"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 3
    assert "warning: w\\x1b]0" in err
    assert all(c.isprintable() for c in (out + err).replace("\n", ""))
    assert all(len(line) < 6000 for line in out.splitlines())


def warn_of_hostile(index):
    warnings.warn(HOSTILE, stacklevel=1)
    raise ValueError(HOSTILE)


def test_convert_packs_everything_and_says_what(checkpoint, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.safetensors"
    assert main(["convert", "somewhere", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # it is no terminal
    assert out.splitlines() == [
        f"{path}: {path.stat().st_size / 1000:.2f} kB",
        f"{'packed exactly':<46}  6  43.78 kB",
        "left as they are, 1 of them matrices of floats  4  3.33 kB",
    ]
    monkeypatch.undo()
    found = pyda8w4.checkpoints.open(path)
    assert found.types == checkpoint.types
    assert found.metadata == checkpoint.metadata
    assert found.packed("model.layers.1.mlp.down_proj").shape == (64, 128)
    result = run("inspect", str(path), PYTHONWARNINGS="error")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nformat      packed safetensors\nmodel       LlamaForCausalLM\n" in result.stdout
    assert "\n  model.layers.*.mlp.experts    3  2 x 64 x 128  MXFP4\n" in result.stdout


def test_convert_refuses_what_is_not_exact_unless_told_to(checkpoint, tmp_path, capsys):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    for i in range(2):
        checkpoint._layers[f"model.layers.{i}.o"] = refused()
    assert main(["convert", "somewhere", str(path)]) == 1
    assert capsys.readouterr().err.endswith(
        "error: somewhere: it has what cannot be packed exactly: "
        "model.layers.*.o of HQQ 4-bit: it is of axis 0 (2 such)\n"
    )
    assert path.read_bytes() == b"old"
    assert main(["convert", "somewhere", str(path), "--requantize"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"\nquantized to 4 bits, groups of 32 +2  ", out)
    assert re.search(
        r"\nquantized again: model\.layers\.\*\.o of HQQ 4-bit, with an error of up to \d+\.\d% of its root mean "
        r"square\n$",
        out,
    )
    assert list(tmp_path.iterdir()) == [path]


def test_convert_shows_progress_on_a_terminal(checkpoint, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["convert", "somewhere", str(tmp_path / "out.safetensors")]) == 0
    *shown, last = sys.stderr.getvalue().split("\r")[1:]
    assert shown[0] == f"[{'.' * 40}]   0% of 49.41 kB"
    assert shown[1] == f"[{'#' * 4}{'.' * 36}]  10% of 49.41 kB"
    assert last == f"[{'#' * 40}] 100% of 49.41 kB\n"
    assert len(shown) == len({*shown, last}) - 1


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--requantize"]])
def test_a_checkpoint_that_is_none_is_one_line(tmp_path, command):
    path = tmp_path / "file.safetensors"
    out = [str(tmp_path / "out.safetensors")] if command[0] == "convert" else []
    result = run(*command, str(path), *out)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"python -m pyda8w4: error: {path}: No such file or directory\n"
    path.write_bytes(b"text")
    result = run(*command, str(path), *out)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (f"python -m pyda8w4: error: {path}: it is not a safetensors file, or is cut off\n")
    assert list(tmp_path.iterdir()) == [path]


# ---- output that goes nowhere ------------------------------------------------------------------

COMMANDS = [
    ["info"], ["selftest", "--kernel", "scalar"], ["bench", "--shapes", "64x64", "--m", "1,2", "--seconds", "0.01"],
    ["explain", "64", "64", "--m", "1"], ["--help"], ["bench", "--help"], ["--version"],
]  # fmt: skip


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_reader_that_stops_is_no_error_message(command, unbuffered):
    # pyda8w4 info | head -1
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "pyda8w4", *command]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    os.close(writer)
    # argparse itself ignores that what it prints is not read, where nothing is buffered.
    assert (done.returncode, done.stderr) in ([(141, "")] if not unbuffered else [(141, ""), (0, "")])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_output_that_has_no_room_is_one_line(command):
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "pyda8w4", *command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (1, "python -m pyda8w4: error: No space left on device\n")


def test_output_that_is_closed():
    command = f"exec {sys.executable} -m pyda8w4 info >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "options", [("-O",), ("-OO",), ("-I",), ("-X", "utf8=0"), ("-W", "error"), ("-bb",)], ids=" ".join
)
def test_every_command_with_options_of_python(options):
    for command in COMMANDS:
        command = [sys.executable, *options, "-m", "pyda8w4", *command]
        environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["benchmark"], "invalid choice: 'benchmark'"),
        (["info", "--all"], "unrecognized arguments: --all"),
        (["selftest", "--kernel", "sse9"], "'sse9' is not a kernel of this build"),
        (["bench", "--kernel", "sse9"], "'sse9' is not a kernel of this build"),
        (["bench", "--shapes", "4096"], "--shapes: must be NxK, such as 4096x4096, got '4096'"),
        (["bench", "--shapes", "0x64"], "--shapes: must be a whole number of at least 1, got '0'"),
        (["bench", "--m", "1,,2"], "--m: must be a whole number of at least 1, got ''"),
        (["bench", "--group-size", "30"], "--group-size: must be a multiple of 4, got 30"),
        (["bench", "--threads", "-1"], "--threads: must be a whole number of at least 1, got '-1'"),
        (["bench", "--threads", "70000"], "--threads: must be at most 65536, got 70000"),
        (["bench", "--plot", "bench.png"], "--plot: must end in .svg, got 'bench.png'"),
        (["bench", "--seconds", "nan"], "--seconds: must be a number above 0, got 'nan'"),
        (["explain", "4096"], "required: K"),
        (["explain", "4096", "0"], "K: must be a whole number of at least 1, got '0'"),
        (["explain", "64", "64", "--m", "0"], "--m: must be a whole number of at least 1, got '0'"),
        (["explain", "64", "64", "--group-size", "6"], "--group-size: must be a multiple of 4, got 6"),
        (["explain", "64", "64", "--bits", "3"], "--bits: invalid choice: 3"),
        (["explain", "64", "64", "--kernel", "sse9"], "'sse9' is not a kernel of this build"),
        (["inspect"], "required: PATH"),
        (["convert", "model.gguf"], "required: OUT.safetensors"),
        (["convert", "model.gguf", "out.gguf"], "OUT.safetensors: must end in .safetensors, got 'out.gguf'"),
    ],
)
def test_bad_arguments_exit_with_2_and_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason(capsys):
    missing = [name for name in pyda8w4.kernels(runnable=False) if name not in pyda8w4.kernels()]
    if not missing:
        pytest.skip("this CPU runs every kernel")
    with pytest.raises(SystemExit) as caught:
        main(["selftest", "--kernel", missing[0]])
    assert caught.value.code == 2
    assert f"{missing[0]!r} cannot run here: " in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line_and_comes_before_the_work(tmp_path):
    path = tmp_path / "missing" / "bench.json"
    result = run("bench", "--json", str(path))
    assert result.returncode == 1
    assert result.stderr == f"python -m pyda8w4: error: {path}: No such file or directory\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["info", "--help"],
        ["selftest", "--help"],
        ["bench", "--help"],
        ["explain", "--help"],
        ["convert", "--help"],
    ],
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert re.match(r"usage: (python -m )?pyda8w4 ", capsys.readouterr().out)


def test_usage_names_the_command_that_was_called():
    assert run("--help").stdout.startswith("usage: python -m pyda8w4 ")
    script = shutil.which("pyda8w4", path=sysconfig.get_path("scripts"))
    done = subprocess.run([script, "bench", "--help"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: pyda8w4 bench ")


def test_sources_without_a_compiled_module_say_what_to_do(tmp_path):
    (tmp_path / "pyda8w4").mkdir()
    shutil.copy(Path(pyda8w4.__file__), tmp_path / "pyda8w4")
    # -S: an editable install would find its compiled module.
    command = [sys.executable, "-S", "-c", "import pyda8w4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / 'pyda8w4'} has no compiled module for this Python.")
    assert "`pip install -e .`" in last


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"pyda8w4 {pyda8w4.__version__}\n"
