"""Which kernel and path multiply, and how near that is to what the machine can do."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from pyda8w4 import _core
from pyda8w4._checks import SCHEMES, check_scheme
from pyda8w4._limits import Limits, limits
from pyda8w4._linear import multiply
from pyda8w4._packed import PackedWeight, check_packed
from pyda8w4._runtime import check_threads, forced_kernel, get_num_threads, translate
from pyda8w4._terminal import counted, in_bytes
from pyda8w4._timing import Spread, cold_bytes, count_copies, time_calls

_SECONDS = 0.3  # of products, for each number of rows


@dataclass(frozen=True)
class Explanation:
    """What `linear` does with a weight and some rows, and what this machine could do at best.

    Attributes
    ----------
    n, k, m : int
        Output features, input features and rows.
    act : str
        To what activations are quantized.
    kernel : str
        The one that is chosen.
    multiplied_by : tuple of str
        The kernels whose micro-kernels multiply: `kernel`, but ``amx`` leaves some weights and few rows to
        ``avx512vnni``.
    form : str
        How they read the weight. ``packed``: codes in place, as they are packed. ``unpacked``: from panels, each
        of which is prepared once for all rows of a row block.
    packed_max : int
        Most rows that read packed codes in place.
    fast_share : float
        Share of the weight that is multiplied on the fast path, which takes whole groups of whole K steps. The
        general path takes all others.
    tile_rows : int
        Most rows of a micro-tile, which has 32 columns.
    row_block : int
        Most rows that pass over a panel together. Each row block reads the weight again.
    k_block : int
        Elements of K in the longest K block.
    threads, most_threads : int
        How many the product is worth, and how many it may use.
    reasons : tuple of str
        Why nothing faster is done: what keeps better kernels, the fast path and more threads away.
    weight_bytes : int
        Bytes of the packed weight.
    operations : int
        Multiplications and additions of 8 bits: 2 * m * n * k, and twice as many with 16-bit activations.
    ms, ms_q1, ms_q3 : float
        Milliseconds of a call with cold weights: the median and the quartiles.
    read_limit, dots_limit : float
        What this machine can do at best with the instructions of `kernel` and `most_threads`: read memory, in
        GB/s, and make operations of 8 bits, in 1e9/s.
    row_blocks : int
        How many there are.
    path : str
        ``fast``, ``general``, or which share is fast.
    read_ms, dots_ms : float
        Milliseconds in which the machine could read the weight once, and make the operations.
    limit : str
        Which of the two takes longer, and so binds: ``read`` or ``dots``.
    of_limit : float
        That time over the time taken. It can pass 1, because the two were not measured at the same time.

    See Also
    --------
    explain : What makes one.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.zeros((64, 256), np.uint8), np.ones((64, 2), np.float32))
    >>> found = pyda8w4.explain(packed, 3)
    >>> found.operations, found.form, found.row_blocks
    (98304, 'packed', 1)
    """

    n: int
    k: int
    m: int
    act: str
    kernel: str
    multiplied_by: tuple[str, ...]
    form: str
    packed_max: int
    fast_share: float
    tile_rows: int
    row_block: int
    k_block: int
    threads: int
    most_threads: int
    reasons: tuple[str, ...]
    weight_bytes: int
    operations: int
    ms: float
    ms_q1: float
    ms_q3: float
    read_limit: float
    dots_limit: float

    @property
    def row_blocks(self) -> int:
        """How many row blocks there are."""
        return -(-self.m // self.row_block)

    @property
    def read_ms(self) -> float:
        """Milliseconds in which this machine could read the weight once."""
        return self.weight_bytes / self.read_limit / 1e6

    @property
    def dots_ms(self) -> float:
        """Milliseconds in which it could make the operations."""
        return self.operations / self.dots_limit / 1e6

    @property
    def limit(self) -> str:
        """Which of the two binds."""
        return "read" if self.read_ms > self.dots_ms else "dots"

    @property
    def of_limit(self) -> float:
        """The time of the limit that binds over the time taken."""
        return max(self.read_ms, self.dots_ms) / self.ms

    @property
    def path(self) -> str:
        """``fast``, ``general``, or the share that is fast."""
        if self.fast_share in (0, 1):
            return "fast" if self.fast_share else "general"
        return f"{self.fast_share:.1%} fast"

    def __str__(self) -> str:
        if self.form == "packed":
            form = "codes are read in place, as they are packed"
        else:
            form = f"each panel is prepared once for all rows of a row block, from {self.packed_max + 1} rows on"
        rows = f"{counted(self.row_blocks, 'row block')} of {self.row_block}"
        binds = {"read": "reading memory", "dots": "dot products"}[self.limit]
        lines = [
            ("product", f"M = {self.m}, N = {self.n}, K = {self.k}, x as {self.act}"),
            ("kernel", self.kernel),
            ("form", f"{self.form}: {form}"),
            ("path", self.path),
            ("blocks", f"micro-tiles of {self.tile_rows} x 32, K blocks of {self.k_block}, {rows}"),
            ("threads", f"{self.threads} of {self.most_threads}"),
            ("weight", in_bytes(self.weight_bytes)),
            ("work", f"{self.operations:,} operations"),
            ("time", f"{Spread(self.ms, self.ms_q1, self.ms_q3, 0)!s} ms".lstrip()),
            ("read", f"{self.read_ms:.3g} ms at {self.read_limit:.1f} GB/s"),
            ("dots", f"{self.dots_ms:.3g} ms at {self.dots_limit:.0f} GOPS"),
            ("limit", f"{binds}, of which {self.of_limit:.0%} are reached"),
            *(("because", reason) for reason in self.reasons),
        ]
        return "\n".join(f"{name:<9}{text}" for name, text in lines)


def explain(packed: PackedWeight, m: int = 1, *, act: str = "uint8", threads: int | None = None) -> Explanation:
    """Say what `linear` would do with a weight, why nothing faster, and how near it is to the limits of this machine.

    Parameters
    ----------
    packed : PackedWeight
        Of shape (N, K).
    m : int
        Rows of activations.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        To what activations are quantized, as in `linear`.
    threads : int, optional
        That the product may use; `get_num_threads` by default.

    Returns
    -------
    Explanation
        It can be printed.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If there are no rows or threads, there is no such scheme, or ``PYDA8W4_KERNEL`` names no kernel that can
        run.

    Notes
    -----
    The plan is that of the C interface (``da8w4_explain``). The product is timed with copies of the weight that
    pass through more than the caches hold, as those of a model do, and with random activations in float32. The
    limits are measured once for each CPU, kernel, number of threads and version, and kept in
    ``~/.cache/pyda8w4/limits.json``, or under ``XDG_CACHE_HOME`` where that is set. All of it takes about a
    second.

    Examples
    --------
    >>> import numpy as np
    >>> import pyda8w4
    >>> packed = pyda8w4.prepack(np.zeros((64, 256), np.uint8), np.ones((64, 2), np.float32))
    >>> with pyda8w4.use_kernel("scalar"):
    ...     found = pyda8w4.explain(packed)
    >>> found.kernel, found.path
    ('scalar', 'general')
    """
    check_packed("packed", packed)
    if isinstance(m, bool) or not isinstance(m, (int, np.integer)):
        raise TypeError(f"m must be an int, got {type(m).__name__}")
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    act = check_scheme("act", act, tuple(SCHEMES))
    return next(explanations(packed, [int(m)], act, threads))


def explanations(packed: PackedWeight, rows: Sequence[int], act: str, threads: int | None) -> Iterator[Explanation]:
    """One for each number of rows, with the same copies of the weight."""
    most_threads = check_threads(threads) or get_num_threads()
    plans = [_plan(packed, m, act, most_threads) for m in rows]
    found = limits(plans[0]["kernel"], most_threads)
    copies = [packed, *(copy.copy(packed) for _ in range(1, count_copies(packed.nbytes, cold_bytes())))]
    for m, plan in zip(rows, plans):
        yield _explanation(packed, m, act, most_threads, plan, _time(copies, m, act, most_threads), found)


def _plan(packed: PackedWeight, m: int, act: str, threads: int) -> dict[str, Any]:
    try:
        return packed._view.explain(m, SCHEMES[act], forced_kernel(), threads)
    except _core.CoreError as error:
        raise translate(error) from None


def _time(copies: Sequence[PackedWeight], m: int, act: str, threads: int) -> Spread:
    """Milliseconds of a call."""
    n, k = copies[0].shape
    x = np.random.default_rng(0).standard_normal((m, k), np.float32)
    out = np.empty((m, n), np.float32)
    calls = cycle([partial(multiply, x, packed, "packed", None, None, act, out, None, threads) for packed in copies])
    return Spread.of([1e3 * seconds for seconds in time_calls(calls, _SECONDS)])


def _explanation(
    packed: PackedWeight, m: int, act: str, most_threads: int, plan: dict[str, Any], ms: Spread, found: Limits
) -> Explanation:
    n, k = packed.shape
    return Explanation(
        n=n,
        k=k,
        m=m,
        act=act,
        kernel=plan["kernel"],
        multiplied_by=tuple(dict.fromkeys(kernel for kernel, _, _, _ in plan["paths"])),
        form="unpacked" if plan["unpacked"] else "packed",
        packed_max=plan["packed_max"],
        fast_share=sum(codes for _, fast, _, codes in plan["paths"] if fast) / (n * k),
        tile_rows=plan["tile_rows"],
        row_block=plan["row_block"],
        k_block=plan["k_block"],
        threads=plan["threads"],
        most_threads=most_threads,
        reasons=tuple(_reasons(plan, most_threads, n * k)),
        weight_bytes=packed.nbytes,
        operations=2 * plan["act_rows"] * n * k,
        ms=ms.median,
        ms_q1=ms.q1,
        ms_q3=ms.q3,
        read_limit=found.read,
        dots_limit=found.dots,
    )


def _reasons(plan: dict[str, Any], most_threads: int, codes: int) -> Iterator[str]:
    """Why no better kernel, no fast path, not all threads."""
    for kernel, _, reason in _core.kernel_table():
        if kernel == plan["kernel"]:
            break
        yield f"{kernel} {f'cannot run here: {reason}' if reason else 'can run here, but another kernel is forced'}"
    for kernel, fast, reason, part in plan["paths"]:
        if reason is not None:
            share = "all" if part == codes else f"{part / codes:.1%}"
            left = "" if kernel == plan["kernel"] else f" left to {kernel}"
            where = left if fast else f"{left and left + ','} on the general path"
            yield f"{share} of the weight is{where}: {reason}"
    if plan["threads"] < most_threads:
        yield f"{plan['threads']} of {most_threads} threads work: the product is too small for more"
