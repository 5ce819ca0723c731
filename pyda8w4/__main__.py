"""The command line: ``pyda8w4 info | selftest | bench | explain | inspect | convert``.

``python -m pyda8w4`` stands for ``pyda8w4``, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import pyda8w4
from pyda8w4 import _core, _explain_command, bench, convert, inspect, selftest
from pyda8w4._checks import SCHEMES
from pyda8w4._format import BITS
from pyda8w4._terminal import pattern_of, printable

_CHECKPOINT = "a GGUF file, a folder with config.json and safetensors files, or a file that convert wrote"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, or 1 where the self-test finds a difference or output cannot be written. Arguments
        that make no sense exit with 2. As in shells, a signal gives 128 and its number: 130 for an
        interrupt, 141 where whoever reads the output, such as ``head``, has stopped.
    """
    parser = _parser()
    try:
        try:
            args = parser.parse_args(argv)
            run: Callable[[argparse.Namespace], int] = args.run
            return run(args)
        finally:
            _flush()
    except _UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:
        return 141
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    except MemoryError:
        message = "there is not enough memory"
    except _Refused as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"{parser.prog}: error: {printable(message)}", file=sys.stderr)
    return 1


def _flush() -> None:
    """Write all output now, where an error can still be told."""
    if sys.stdout is None:  # closed
        return
    try:
        sys.stdout.flush()
    except OSError:
        # What is left in the buffer goes nowhere: Python would try again at its end, and print a traceback.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        raise


class _UsageError(Exception):
    """Arguments or environment that cannot be used."""


class _Refused(Exception):
    """Files that cannot be used."""


def _parser() -> argparse.ArgumentParser:
    by_module = os.path.basename(sys.argv[0]) == "__main__.py"
    name = "python -m pyda8w4" if by_module else "pyda8w4"
    summary = pyda8w4.__doc__ and pyda8w4.__doc__.splitlines()[0]  # python -OO keeps no docstrings
    parser = argparse.ArgumentParser(prog=name, description=summary)
    parser.add_argument("--version", action="version", version=f"pyda8w4 {pyda8w4.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = _add(commands, "info", _info, "show the CPU, the kernels that it can run, and threads")
    command.add_argument("--json", action="store_true", help="as JSON, for a bug report")

    command = _add(commands, "selftest", _selftest, "compare every kernel with the numpy reference, bit for bit")
    command.add_argument("--kernel", type=_kernel, metavar="NAME", help="test only this one")

    command = _add(commands, "bench", _bench, "time layers of language models against numpy's float32")
    command.add_argument(
        "--shapes",
        type=_list_of(_shape),
        default=bench.SHAPES,
        metavar="NxK,...",
        help=f"outputs x inputs of layers (default: {','.join(f'{n}x{k}' for n, k in bench.SHAPES)})",
    )
    command.add_argument(
        "--m",
        type=_list_of(_positive),
        default=bench.ROWS,
        metavar="M,...",
        help=f"rows of activations (default: {','.join(map(str, bench.ROWS))})",
    )
    _add_layer_options(command, "of pyda8w4, and of numpy with threadpoolctl")
    command.add_argument(
        "--seconds",
        type=_seconds,
        default=bench.SECONDS,
        metavar="S",
        help=f"for each shape and M (default: {bench.SECONDS})",
    )
    command.add_argument("--json", metavar="FILE", help="write all numbers to this file, too")
    command.add_argument("--plot", type=_ending_in(".svg"), metavar="FILE.svg", help="draw them to this file, too")

    command = _add(commands, "explain", _explain, "say how a layer is multiplied, and how fast that could be")
    command.add_argument("n", type=_positive, metavar="N", help="outputs of the layer")
    command.add_argument("k", type=_positive, metavar="K", help="inputs of the layer")
    command.add_argument(
        "--m",
        type=_list_of(_positive),
        default=_explain_command.ROWS,
        metavar="M,...",
        help=f"rows of activations (default: {','.join(map(str, _explain_command.ROWS))})",
    )
    _add_layer_options(command, "that a product may use")

    command = _add(commands, "inspect", _inspect, "show what is in a checkpoint, and what of it can be packed exactly")
    command.add_argument("path", type=Path, metavar="PATH", help=_CHECKPOINT)

    command = _add(commands, "convert", _convert, "pack a whole checkpoint once, into a file that is mapped")
    command.add_argument("path", type=Path, metavar="PATH", help=_CHECKPOINT)
    command.add_argument("out", type=_ending_in(".safetensors"), metavar="OUT.safetensors", help="the file to write")
    command.add_argument(
        "--requantize", action="store_true", help="quantize to 4 bits what is quantized but cannot be packed exactly"
    )
    return parser


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.set_defaults(run=run)
    return command


def _add_layer_options(command: argparse.ArgumentParser, threads: str) -> None:
    command.add_argument(
        "--group-size", type=_group_size, default=128, metavar="G", help="weights that share a scale (default: 128)"
    )
    command.add_argument("--bits", type=int, choices=BITS, default=4, help="of a weight's code (default: 4)")
    command.add_argument(
        "--act", choices=tuple(SCHEMES), default="uint8", help="to what activations are quantized (default: uint8)"
    )
    command.add_argument("--threads", type=_threads, metavar="T", help=threads)
    command.add_argument("--kernel", type=_kernel, metavar="NAME", help="instead of the default one")


def _info(args: argparse.Namespace) -> int:
    info = _cpu_info()
    if args.json:
        print(json.dumps(_report(info), indent=2))
        return 0
    runtime = "pyda8w4's own" if info["thread_runtime"] == "own" else info["thread_runtime"]
    features = (name if present else f"no {name}" for name, present in info["features"].items())
    chosen = "PYDA8W4_KERNEL" if os.environ.get("PYDA8W4_KERNEL") else "the best that runs here"
    rows = [
        ("pyda8w4", pyda8w4.__version__),
        ("python", f"{platform.python_version()}, numpy {np.__version__}"),
        ("cpu", info["cpu"]),
        ("features", ", ".join(features)),
        ("kernel", f"{info['kernel']} ({chosen})"),
        ("threads", f"{info['threads']}, {runtime}"),
        ("library", pyda8w4.get_library()),
        ("headers", pyda8w4.get_include()),
    ]
    for name, text in rows:
        print(f"{name:<10}{text}")
    print("kernels")
    for name, description, reason in _core.kernel_table():
        print(f"  {name:<12}{description}")
        if reason:
            print(f"  {'':<12}cannot run here: {reason}")
    return 0


def _report(info: dict[str, Any]) -> dict[str, Any]:
    return {
        "pyda8w4": pyda8w4.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "platform": platform.platform(),
        **info,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("PYDA8W4_", "OMP_"))},
        "library": pyda8w4.get_library(),
        "headers": pyda8w4.get_include(),
    }


def _selftest(args: argparse.Namespace) -> int:
    _cpu_info()
    return selftest.main(args.kernel)


def _bench(args: argparse.Namespace) -> int:
    _cpu_info()
    if args.threads is not None:
        pyda8w4.set_num_threads(args.threads)
    with (
        pyda8w4.use_kernel(args.kernel) if args.kernel else nullcontext(),
        open(args.json, "w") if args.json else nullcontext() as json_file,
        open(args.plot, "w", encoding="utf-8") if args.plot else nullcontext() as plot_file,
    ):
        return bench.main(
            args.shapes,
            args.m,
            args.group_size,
            args.seconds,
            args.threads,
            json_file,
            plot_file,
            bits=args.bits,
            act=args.act,
        )


def _explain(args: argparse.Namespace) -> int:
    _cpu_info()
    with pyda8w4.use_kernel(args.kernel) if args.kernel else nullcontext():
        return _explain_command.main(
            args.n, args.k, args.m, args.group_size, args.threads, bits=args.bits, act=args.act
        )


def _inspect(args: argparse.Namespace) -> int:
    return _on_files(partial(inspect.main, args.path))


def _convert(args: argparse.Namespace) -> int:
    return _on_files(partial(convert.main, args.path, args.out, args.requantize))


def _on_files(run: Callable[[], int]) -> int:
    """Run a command whose errors and warnings may have anything in them that a file has."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            return run()
        except (ValueError, ImportError) as error:
            raise _Refused(error) from None
        finally:
            for message, count in Counter(pattern_of(str(warning.message)) for warning in caught).items():
                times = f" ({count} such)" if count > 1 else ""
                print(f"warning: {printable(message)}{times}", file=sys.stderr)


def _cpu_info() -> dict[str, Any]:
    """What pyda8w4.cpu_info says; a PYDA8W4_KERNEL that cannot be used is refused, as a bad argument is."""
    try:
        return pyda8w4.cpu_info()
    except ValueError as error:
        raise _UsageError(error) from None


# ---- types of arguments ----------------------------------------------------------------------


def _ending_in(suffix: str) -> Callable[[str], Path]:
    def check(text: str) -> Path:
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"must end in {suffix}, got {text!r}")
        return Path(text)

    return check


def _kernel(text: str) -> str:
    try:
        with pyda8w4.use_kernel(text):
            return text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _threads(text: str) -> int:
    threads = _positive(text)
    if threads > 65536:
        raise argparse.ArgumentTypeError(f"must be at most 65536, got {text}")
    return threads


def _group_size(text: str) -> int:
    group = _positive(text)
    if group % 4:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4, got {text}")
    return group


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return seconds


def _shape(text: str) -> tuple[int, int]:
    n, cross, k = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"must be NxK, such as 4096x4096, got {text!r}")
    return _positive(n), _positive(k)


def _list_of(item: Callable[[str], object]) -> Callable[[str], list[Any]]:
    return lambda text: [item(part.strip()) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
