"""Pictures of what compare.py measured.

    python benchmarks/compare.py --json results.json
    python benchmarks/plot.py results.json            # writes docs/images/*.svg

``roofline-T.svg``: operations a second over operations per byte of weight, beside the machine's limits, with
T threads. ``ratio-NxK-gG-T.svg``: time over that of pyda8w4, over the number of rows. The same figures go to
stdout as tables in Markdown, for docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pyda8w4._svg import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Note, Series, chart

# A mark for each library, too: not everybody can tell colours apart.
_STYLES = {
    "pyda8w4": (BLACK, "circle", "solid"),
    "pyda8w4-avx2": (BLACK, "square", "dotted"),
    "onnxruntime": (BLUE, "up", "solid"),
    "openvino": (ORANGE, "down", "solid"),
    "zentorch": (RED, "diamond", "solid"),
    "vllm": (PURPLE, "plus", "solid"),
    "gptqmodel": (PURPLE, "dot", "dashed"),
    "ggml-q4_0": (GREEN, "left", "solid"),
    "ggml-q4_k": (GREEN, "right", "dashed"),
    "torch-int4pack": (SKY, "cross", "solid"),
    "torch-int8": (SKY, "pentagon", "dashed"),
    "torch-bf16": (SKY, "star", "dotted"),
    "numpy-float32": (GREY, "hexagon", "solid"),
}
_OTHER = (GREY, "dot", "dashed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what compare.py --json wrote")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    options.folder.mkdir(parents=True, exist_ok=True)
    for threads in sorted({table["threads"] for table in report["tables"]}):
        tables = [table for table in report["tables"] if table["threads"] == threads]
        _save(_roofline(tables, report), options.folder / f"roofline-{threads}.svg")
        for table in tables:
            name = f"ratio-{table['n']}x{table['k']}-g{table['group_size']}-{threads}.svg"
            _save(_ratios(table, report), options.folder / name)
    for table in report["tables"]:
        print(_markdown(table))


def _roofline(tables: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """Every library's cells on the limits that were measured between them."""
    cells = [cell for table in tables for cell in table["cells"]]
    read = _middle([cell["limits"]["read"]["median"] for cell in cells])
    peaks = {
        name.removeprefix("dots "): _middle([cell["limits"][name]["median"] for cell in cells])
        for name in cells[0]["limits"]
        if name.startswith("dots ")
    }
    points: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        for cell in table["cells"]:
            for name, result in cell["results"].items():
                work = 2 * cell["m"] * table["n"] * table["k"]
                points.setdefault(name, []).append((work / table["sizes"][name]["weight_bytes"], result["gops"]))
    least, most = (pick(x for xs in points.values() for x, _ in xs) for pick in (min, max))
    series, notes = [], [Note(least, read * least, f"read {read:.1f} GB/s", ends=False)]
    for isa, peak in peaks.items():
        knee = peak / read
        series.append(Series("", [(least, read * least), (knee, peak), (max(most, knee), peak)], "#999999", "solid"))
        notes.append(Note(max(most, knee), peak, f"{isa} {peak:.0f} GOPS", ends=True))
    for name, xs in points.items():
        colour, mark, _ = _STYLES.get(name, _OTHER)
        series.append(Series(name, xs, colour, mark=mark))
    return chart(
        f"Layers on the roofline, {_setting(tables[0], report)}",
        "operations per byte of weight, in the library's own format",
        "GOPS",
        series,
        notes=notes,
    )


def _ratios(table: dict[str, Any], report: dict[str, Any]) -> str:
    """Times over that of pyda8w4: above 1 is slower."""
    series = []
    for name in dict.fromkeys(name for cell in table["cells"] for name in cell["results"]):
        found = [(cell["m"], cell["results"][name]["ratio"]) for cell in table["cells"] if name in cell["results"]]
        found = [(m, ratio) for m, ratio in found if ratio]
        if found:
            colour, mark, line = _STYLES.get(name, _OTHER)
            series.append(Series(name, found, colour, line, mark))
    return chart(
        f"{table['n']} x {table['k']}, groups of {table['group_size']}, {_setting(table, report)}",
        "rows M",
        "time over that of pyda8w4",
        series,
        x_ticks=[cell["m"] for cell in table["cells"]],
        y_text="{:g}x".format,
    )


def _markdown(table: dict[str, Any]) -> str:
    """A table of pyda8w4's times, the ratios of all others to them, and the limits of the same minutes."""
    rows = {"": [f"M = {cell['m']}" for cell in table["cells"]]}
    for cell in table["cells"]:
        result = cell["results"]["pyda8w4"]
        found = f"{result['ms']['median']:.3g} ms, {result['of_limit']:.0%}"
        rows.setdefault("pyda8w4, of the limit", []).append(found)
    names = dict.fromkeys(name for cell in table["cells"] for name in cell["results"] if name != "pyda8w4")
    for name in names:
        results = [cell["results"].get(name) for cell in table["cells"]]
        rows[name] = [f"{result['ratio']:.2f} x" if result else "" for result in results]
    for limit, unit in (("read", "GB/s"), ("dots avx512vnni", "GOPS"), ("dots avx2", "GOPS")):
        if limit in table["cells"][0]["limits"]:
            rows[f"limit: {limit}, {unit}"] = [f"{cell['limits'][limit]['median']:.3g}" for cell in table["cells"]]
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines.insert(1, "|---" * (1 + len(table["cells"])) + "|")
    threads = f"{table['threads']} thread{'s' * (table['threads'] != 1)}"
    title = f"**{table['n']} x {table['k']}, groups of {table['group_size']}, {threads}**"
    return "\n".join(["", title, "", *lines])


def _setting(table: dict[str, Any], report: dict[str, Any]) -> str:
    threads = table["threads"]
    warmth = "cold" if report["cold_bytes"] else "hot"
    return f"{threads} thread{'s' * (threads != 1)}, {warmth} weights\n{report['machine']['cpu']}"


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _save(picture: str, path: Path) -> None:
    path.write_text(picture, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
