"""The benchmarks run and write what plot.py reads; how fast anything is, is not tested."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.slow
def test_compare_writes_every_cell(tmp_path):
    results = tmp_path / "results.json"
    options = "--shapes 64x96 --m 1,3 --group-size 32 --threads 1 --hot --seconds 0.01 --rounds 1 --settle 0"
    peers = "--peers pyda8w4,numpy-float32,pyda8w4-scalar,pyda8w4-q6_k:int8_group,pyda8w4-int8:int16"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compare.py", *options.split(), *peers.split(), "--json", results],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYDA8W4_KERNEL": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
    (table,) = json.loads(results.read_text())["tables"]
    assert (table["n"], table["k"], table["group_size"], table["threads"], table["without"]) == (64, 96, 32, 1, {})
    assert [cell["m"] for cell in table["cells"]] == [1, 3]
    for cell in table["cells"]:
        assert cell["failed"] == {}
        assert cell["limits"]["read"]["median"] > 0
        for name, most in (
            ("pyda8w4", 0.02),
            ("pyda8w4-scalar", 0.02),
            ("pyda8w4-q6_k:int8_group", 0.02),
            ("pyda8w4-int8:int16", 1e-4),
            ("numpy-float32", 1e-6),
        ):
            result = cell["results"][name]
            assert 0 < result["ms"]["q1"] <= result["ms"]["median"] <= result["ms"]["q3"]
            assert 0 < result["error"] < most
            assert f"{name} " in done.stdout
        assert cell["results"]["pyda8w4"]["ratio"] == 1
    plot = [sys.executable, BENCHMARKS / "plot.py", results, "--folder", tmp_path]
    done = subprocess.run(plot, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n| pyda8w4, of the limit | " in done.stdout
    for name, label in (("roofline-1", "operations per byte"), ("ratio-64x96-g32-1", "time over that of pyda8w4")):
        texts = [text.text for text in ElementTree.parse(tmp_path / f"{name}.svg").getroot().iter(f"{SVG}text")]
        assert any(text.startswith(label) for text in texts)
        assert {"pyda8w4", "numpy-float32", "pyda8w4-int8:int16"} < set(texts)


def test_every_library_is_known_and_says_why_it_is_missing() -> None:
    code = "from peers import PEERS; print([(name, peer.about, peer.missing()) for name, peer in PEERS.items()])"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    found = {name: missing for name, _, missing in ast.literal_eval(done.stdout.splitlines()[-1])}
    modules = {path.stem for path in (BENCHMARKS / "peers").glob("*.py")} - {"__init__", "base", "torch_base"}
    assert {re.split("[-:]", name)[0] for name in found} == modules
    assert next(iter(found)) == "pyda8w4"
    assert found["pyda8w4"] is None
    assert found["numpy-float32"] is None
    assert all(reason is None or reason for reason in found.values())


def test_kinds_say_how_many_bytes_they_have() -> None:
    code = (
        "from peers import PEERS, Layer; layer = Layer.random(64, 1024, 64)\n"
        "for name in ('', *(f'-{kind}' for kind in ('q4_k', 'q5_k', 'q6_k', 'table', 'int5', 'int6', 'int8'))):\n"
        "    peer = PEERS['pyda8w4' + name]\n"
        "    packed = peer(layer, 1, 1).packed[0]\n"
        "    print(name, peer.weight_bytes(layer), packed.nbytes - 4 * 64 - 16 * (name == '-table'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    rows = [line.split(" ") for line in done.stdout.splitlines()]
    assert len(rows) == 8
    assert [said for _, said, _ in rows] == [found for _, _, found in rows]


@pytest.mark.slow
def test_experts_writes_every_cell(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    options = "--m 1,3 --group-size 32 --threads 1 --hot --seconds 0.01 --rounds 1 --settle 0"
    mixtures = "--mixtures 4x2x96x64,4x2x96x64:swigluoai --peers pyda8w4,pyda8w4-linear"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "experts.py", *options.split(), *mixtures.split(), "--json", results],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYDA8W4_KERNEL": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
    tables = json.loads(results.read_text())["tables"]
    assert [(table["mixture"], table["measured"]["activation"]) for table in tables] == [
        ("4x2x96x64", "silu"),
        ("4x2x96x64:swigluoai", "swigluoai"),
    ]
    for table in tables:
        assert (table["without"], table["layers"]) == ({}, 1)
        assert table["measured"] == table["model"]
        assert [cell["m"] for cell in table["cells"]] == [1, 3]
        for cell in table["cells"]:
            assert cell["failed"] == {}
            assert 2 <= cell["chosen"] <= 4
            assert cell["read_gb_per_s"]["median"] > 0
            assert cell["dense_seconds"]["median"] > 0
            for name in ("pyda8w4", "pyda8w4-linear"):
                result = cell["results"][name]
                assert 0 < result["ms"]["q1"] <= result["ms"]["median"] <= result["ms"]["q3"]
                assert 0 < result["error"] < 0.03
                assert result["of_read"] > 0
                assert result["of_dense"] > 0
                assert f"{name} " in done.stdout
            assert cell["results"]["pyda8w4"]["ratio"] == 1


def test_every_mixture_is_known_and_says_why_it_is_missing() -> None:
    code = "from mixtures import MIXTURES; print([(name, mixture.missing()) for name, mixture in MIXTURES.items()])"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    found = dict(ast.literal_eval(done.stdout.splitlines()[-1]))
    modules = {path.stem for path in (BENCHMARKS / "mixtures").glob("*.py")} - {"__init__", "base"}
    assert {name.partition("-")[0] for name in found} == modules
    assert next(iter(found)) == "pyda8w4"
    assert found["pyda8w4"] is None
    assert all(reason is None or reason for reason in found.values())


def test_wrong_experts_are_not_timed() -> None:
    code = (
        "from experts import MixtureTimer, Shape; from pyda8w4 import stack\n"
        "timer = MixtureTimer('pyda8w4', 1)\n"
        "timer.build(Shape(4, 2, 64, 32), 32, 1)\n"
        "print(timer.bind(3)['error'] < 0.03)\n"
        "gate_up, down = timer._mixture.weights[0]\n"
        "timer._mixture.weights[0] = stack(list(gate_up)[::-1]), down\n"
        "try:\n"
        "    timer.bind(3)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    right, wrong = done.stdout.splitlines()
    assert right == "True"
    assert re.fullmatch(r"Unavailable its result is wrong: an error of [0-9.e+]+, where 0.03 is allowed", wrong)


def test_calls_pass_through_all_experts() -> None:
    code = (
        "import numpy as np; from mixtures import SHAPES, routing\n"
        "for shape in SHAPES.values():\n"
        "    for m in (1, 4, 256):\n"
        "        found = routing(shape, m, 2)\n"
        "        ids = [ids for layer, ids in found.calls if layer == 1]\n"
        "        used = [np.unique(each) for each in ids]\n"
        "        rows = [sorted(np.bincount(each.reshape(-1), minlength=shape.experts)) for each in ids]\n"
        "        assert len(found.calls) == 2 * len(ids)\n"
        "        assert all(each.shape == (m, shape.top) for each in ids)\n"
        "        assert all(len(set(token)) == shape.top for each in ids for token in each.tolist())\n"
        "        assert all(len(each) == found.chosen for each in used) and rows.count(rows[0]) == len(rows)\n"
        "        assert sorted(set(np.concatenate(used).tolist())) == list(range(shape.experts))\n"
        "        assert len(ids) < 2 or found.chosen > shape.experts // 2 or not set(used[0]) & set(used[1])\n"
        "        assert np.allclose(found.weights.sum(axis=1), 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


@pytest.mark.slow
def test_kinds_prints_its_tables() -> None:
    options = "--shape 64x256 --threads 1 --hot --seconds 0.001 --rounds 1 --settle 0"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "kinds.py", *options.split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    tables = [line.count("|") for line in done.stdout.splitlines() if line.startswith("|")]
    assert tables == [8] * 11 + [8] * 6


def test_divergence_and_loss_of_predictions() -> None:
    """The exact model gives 1/2, 1/4, 1/4, and then three equal chances; the other turns the first around."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    code = (
        "import sys; sys.path.insert(0, '../examples')\n"
        "import numpy as np; from quality_language import compare, summary\n"
        "exact = np.log(np.array([[2, 1, 1], [5, 5, 5]], np.float32)) + 100\n"
        "found = np.log(np.array([[1, 1, 2], [1, 1, 1]], np.float32)) - 100\n"
        "loss, found_loss, divergence, same = compare(exact, found, np.array([0, 2]))\n"
        "two, three = np.log(2), np.log(3)\n"
        "assert np.allclose(loss, (two + three) / 2) and np.allclose(found_loss, (2 * two + three) / 2)\n"
        "assert np.allclose(divergence, two / 8) and same == 0.5\n"
        "row = summary(np.array([[1, 1, 0.25, 1], [2, 2 + 2 * two, 0.75, 0.5]]))\n"
        "assert np.isclose(row['perplexity'], np.exp(1.5) * 2)\n"
        "assert np.allclose(row['over float32, %'], (100, 200 * two))\n"
        "assert row['1000 x KL'] == (500, 250) and row['same token, %'] == 75\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_embeddings_are_compared_by_cosines_and_neighbours() -> None:
    pytest.importorskip("tokenizers")
    code = (
        "import numpy as np; import quality_sentences; from quality_sentences import compare_embeddings, overlap\n"
        "exact = np.array([[1, 0.9, 0.8, 0], [0.9, 1, 0, 0.8], [0.8, 0, 1, 0.9], [0, 0.8, 0.9, 1]])\n"
        "found = np.array([[1, 0.9, 0, 0.8], [0.9, 1, 0, 0.8], [0, 0.8, 1, 0.9], [0.8, 0, 0.9, 1]])\n"
        "assert overlap(exact, exact, 2) == 1 and overlap(exact, found, 2) == (1 + 2 + 1 + 1) / 8\n"
        "quality_sentences.TOP = 1\n"
        "exact = np.eye(3, dtype=np.float32)\n"
        "found = np.array([[0.6, 0.8, 0], [0, 1, 0], [0, 0, 1]], np.float32)\n"
        "row = compare_embeddings(exact, found)\n"
        "assert np.allclose([row['1000 x (1 - cosine)'], row['the worst']], [400 / 3, 400])\n"
        "assert np.isclose(row['1000 x similarity'], 1000 * np.sqrt(2 * 0.64 / 6))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_activation_of_the_sentence_model_is_gelu() -> None:
    pytest.importorskip("tokenizers")
    code = (
        "import math; import numpy as np; from sentence_model import gelu\n"
        "x = np.linspace(-8, 8, 1001, dtype=np.float32)\n"
        "exact = [each * (1 + math.erf(each / math.sqrt(2))) / 2 for each in x.tolist()]\n"
        "assert gelu(x).dtype == np.float32 and abs(gelu(x) - exact).max() < 6e-7\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_of_quality_have_a_cell_for_each_column_and_a_line_for_each_quantizer() -> None:
    code = (
        "from quality_tables import Table, mean_and_error\n"
        "rows = [{'weights': 'float32'}]\n"
        "rows += [\n"
        "    {'weights': name, 'groups of': g, 'activations': 'int16', 'bits': 4 + 16 / g, 'KL': (1 / g, 0.5)}\n"
        "    for name in ('Q1', 'Q2') for g in (32, 64)\n"
        "]\n"
        "rows.append({**rows[-1], 'activations': 'uint8'})\n"
        "table = Table('T', {'weights': '', 'bits': '.2f', 'KL': '.3f'}, rows, 'KL')\n"
        "assert mean_and_error([1, 3]) == (2, 1)\n"
        "print(table.markdown())\n"
        "print(table.plot('T'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    title, _, _, _, *cells = done.stdout.partition("\n<svg")[0].splitlines()
    assert title == "T"
    assert cells[:2] == ["| float32 |  |  |", "| Q1 | 4.50 | 0.031 ± 0.500 |"]
    assert len(cells) == 6
    picture = ElementTree.fromstring("<svg" + done.stdout.partition("\n<svg")[2])
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"Q1", "Q2", "Q2, uint8", "bits per weight", "KL", "4.25", "4.5"} <= set(texts)


def test_benchmarks_time_by_the_method_of_this_tree(tmp_path: Path) -> None:
    """Also where another pyda8w4 comes first, as in compare_commits.py."""
    (tmp_path / "pyda8w4").mkdir()
    (tmp_path / "pyda8w4" / "__init__.py").touch()
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'pyda8w4' not in type(f).__module__]; "
    code += "import timing, pyda8w4; print(timing.time_calls.__code__.co_filename, pyda8w4.__file__, sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True, env=environment
    )
    method, package = done.stdout.splitlines()
    assert Path(method).samefile(BENCHMARKS.parent / "pyda8w4" / "_timing.py")
    assert Path(package).is_relative_to(tmp_path)


def test_commits_are_compared_as_they_are_in_their_folders(tmp_path: Path) -> None:
    """An editable install once took the place of both."""
    code = f"import compare_commits; compare_commits.from_folder({str(tmp_path)!r}, 1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"not from {tmp_path}" in done.stderr or "No module named 'pyda8w4'" in done.stderr
