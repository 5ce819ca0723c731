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

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which nearly everybody can tell apart, and a mark for each besides.
_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _RED, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
_STYLES = {
    "pyda8w4": (_BLACK, "o", "-"),
    "pyda8w4-avx2": (_BLACK, "s", ":"),
    "onnxruntime": (_BLUE, "^", "-"),
    "openvino": (_ORANGE, "v", "-"),
    "zentorch": (_RED, "D", "-"),
    "vllm": (_PURPLE, "P", "-"),
    "ggml-q4_0": (_GREEN, "<", "-"),
    "ggml-q4_k": (_GREEN, ">", "--"),
    "torch-int4pack": (_SKY, "X", "-"),
    "torch-int8": (_SKY, "p", "--"),
    "torch-bf16": (_SKY, "*", ":"),
    "numpy-float32": (_GREY, "h", "-"),
}
_OTHER = (_GREY, ".", "--")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what compare.py --json wrote")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    options.folder.mkdir(parents=True, exist_ok=True)
    # No date and no random ids in the files: the same results give the same pictures.
    plt.rcParams.update(
        {"svg.hashsalt": "pyda8w4", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    for threads in sorted({table["threads"] for table in report["tables"]}):
        tables = [table for table in report["tables"] if table["threads"] == threads]
        _save(_roofline(tables, report), options.folder / f"roofline-{threads}.svg")
        for table in tables:
            name = f"ratio-{table['n']}x{table['k']}-g{table['group_size']}-{threads}.svg"
            _save(_ratios(table, report), options.folder / name)
    for table in report["tables"]:
        print(_markdown(table))


def _roofline(tables: list[dict[str, Any]], report: dict[str, Any]) -> Any:
    """Every library's cells on the limits that were measured between them."""
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
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
    ends = [least / 1.5, most * 1.5]
    label: dict[str, Any] = {"va": "center", "size": 8, "color": "#555555", "backgroundcolor": "#ffffff", "zorder": 1.5}
    for isa, peak in peaks.items():
        knee = peak / read
        axes.plot([ends[0], knee, max(ends[1], knee)], [read * ends[0], peak, peak], color="#999999", lw=1.2, zorder=1)
        axes.text(ends[1], peak, f"{isa} {peak:.0f} GOPS ", ha="right", **label)
    axes.text(ends[0], read * ends[0], f" read {read:.1f} GB/s", ha="left", **label)
    for name, xs in points.items():
        colour, mark, _ = _STYLES.get(name, _OTHER)
        axes.plot(*zip(*xs), color=colour, marker=mark, ms=6, ls="", label=name, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(None, 1.5 * max(peaks.values(), default=0) or None))
    axes.set_xlabel("operations per byte of weight, in the library's own format")
    axes.set_ylabel("GOPS")
    axes.set_title(f"Layers on the roofline, {_setting(tables[0], report)}", loc="left")
    axes.grid(color="#eeeeee", zorder=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _ratios(table: dict[str, Any], report: dict[str, Any]) -> Any:
    """Times over that of pyda8w4: above 1 is slower."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    names = dict.fromkeys(name for cell in table["cells"] for name in cell["results"])
    for name in names:
        found = [(cell["m"], cell["results"][name]["ratio"]) for cell in table["cells"] if name in cell["results"]]
        found = [(m, ratio) for m, ratio in found if ratio]
        if not found:
            continue
        colour, mark, line = _STYLES.get(name, _OTHER)
        axes.plot(*zip(*found), color=colour, marker=mark, ls=line, lw=1.4, ms=5, label=name)
    rows = [cell["m"] for cell in table["cells"]]
    axes.set(xscale="log", yscale="log", xticks=rows, xticklabels=rows)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("rows M")
    axes.set_ylabel("time over that of pyda8w4")
    title = f"{table['n']} x {table['k']}, groups of {table['group_size']}, {_setting(table, report)}"
    axes.set_title(title, loc="left")
    axes.grid(color="#eeeeee")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


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


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    main()
