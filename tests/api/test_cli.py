"""The commands of ``pyda8w4`` and ``python -m pyda8w4``, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import pyda8w4
from pyda8w4 import _timing, bench, reference, selftest
from pyda8w4.__main__ import main


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


def test_info_says_that_the_environment_chose_the_kernel():
    assert "scalar (PYDA8W4_KERNEL)" in run("info", PYDA8W4_KERNEL="scalar").stdout


@pytest.mark.parametrize("command", ["info", "selftest", "bench"])
def test_an_unknown_kernel_in_the_environment_is_one_line(command):
    result = run(command, PYDA8W4_KERNEL="sse9")
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
    assert main(["selftest"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(results) + 1


@pytest.mark.parametrize("function", ["quantize_activation", "gemm", "linear"])
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


def test_selftest_notices_a_kernel_that_goes_wrong(few_shapes, monkeypatch):
    right = selftest.linear

    def wrong_in_the_last_column(x, packed, *args, **options):
        y = right(x, packed, *args, **options)
        y[..., -1] += np.ones((), y.dtype)
        return y

    monkeypatch.setattr(selftest, "linear", wrong_in_the_last_column)
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


def test_bench_as_a_process():
    result = run("bench", "--shapes", "512x1024", "--m", "1", "--seconds", "0.01", "--threads", "1")
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 thread" in result.stdout
    assert "\n512x1024 " in result.stdout


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


# ---- output that goes nowhere ------------------------------------------------------------------

COMMANDS = [
    ["info"], ["selftest", "--kernel", "scalar"], ["bench", "--shapes", "64x64", "--m", "1,2", "--seconds", "0.01"],
    ["--help"], ["bench", "--help"], ["--version"],
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
        (["bench", "--seconds", "nan"], "--seconds: must be a number above 0, got 'nan'"),
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


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["selftest", "--help"], ["bench", "--help"]])
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
