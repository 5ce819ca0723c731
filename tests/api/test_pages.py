"""What pages show is true: blocks of ```python run, one after another, and print what stands in the comments.

Blocks of ```py are excerpts, which need a model that the reader has.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import EXAMPLES, write_folder

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
PAGES = [
    page for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]) if BLOCK.search(page.read_text("utf-8"))
]
NEEDED = re.compile(r"(?:^import |find_spec\(\")(\w+)", re.MULTILINE)


def gptq(names: list[str]) -> dict[str, np.ndarray]:
    tensors = EXAMPLES["gptq"].tensors
    return {f"{name}.{part.removeprefix('m.q.')}": array for name in names for part, array in tensors.items()}


def write_checkpoints() -> None:
    """Those that docs/checkpoints.md opens: of the same names, and of few tensors."""
    config = {"quantization_config": EXAMPLES["gptq"].config}
    norm = {"model.norm.weight": np.ones(64, np.float32)}
    dense = gptq(["model.layers.0.self_attn.q_proj"])
    write_folder(Path("Qwen3-8B-GPTQ-Int4"), {"model.safetensors": {**dense, **norm}}, config, index=False)
    parts = ("gate", "up", "down")
    experts = gptq([f"model.layers.0.mlp.experts.{i}.{part}_proj" for i in range(128) for part in parts])
    write_folder(Path("Qwen3-30B-A3B-GPTQ-Int4"), {"model.safetensors": experts}, config, index=False)

    import gguf

    writer = gguf.GGUFWriter("Qwen3-30B-A3B-Q4_0.gguf", "qwen3moe")
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for part in parts:
        blocks = gguf.quantize(np.ones((128, 32, 32), np.float32), q4_0)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", blocks, raw_dtype=q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def given_to(page: str) -> dict[str, Any]:
    """What a page takes for granted: files, and names."""
    if page != "checkpoints.md":
        return {}
    pytest.importorskip("gguf")
    write_checkpoints()
    return {part.removeprefix("m.q."): array for part, array in EXAMPLES["gptq"].tensors.items()}


def printed(comment: str) -> re.Pattern[str]:
    """A comment may leave out what stands in the place of dots."""
    return re.compile(".*".join(map(re.escape, comment.split("..."))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    left_out = set()
    names = given_to(page.name)
    text = page.read_text("utf-8")
    for block in BLOCK.finditer(text):
        if missing := {name for name in NEEDED.findall(block[1]) if not importlib.util.find_spec(name)}:
            left_out |= missing
            continue
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], page, "exec"), names)
        comments, lines = PRINTED.findall(block[1]), capsys.readouterr().out.splitlines()
        assert len(comments) == len(lines)
        for comment, output in zip(comments, lines):
            assert printed(comment).fullmatch(output)
    if left_out:
        pytest.skip(f"but for blocks that need {', '.join(sorted(left_out))}")
