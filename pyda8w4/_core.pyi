from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy.typing as npt

# The memory of an array, or an address.
_Memory: TypeAlias = npt.NDArray[Any] | int

class CoreError(Exception): ...

class Memory:
    def __new__(cls, size: int) -> Memory: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Source:
    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        super: int,
        kind: int,
        format: int,
        codes: npt.NDArray[Any],
        codes_stride: int,
        table: npt.NDArray[Any] | None,
        scales: npt.NDArray[Any],
        sub_scales: npt.NDArray[Any] | None,
        sub_scale_type: int,
        zps: npt.NDArray[Any] | None,
        zp: int,
        offsets: npt.NDArray[Any] | None,
        sub_offsets: npt.NDArray[Any] | None,
        sub_offset_type: int,
    ) -> None: ...
    def plan_pack(self) -> tuple[int, int | None]: ...
    def pack(
        self,
        codes: npt.NDArray[Any],
        scales: npt.NDArray[Any],
        sums: npt.NDArray[Any],
        zps: npt.NDArray[Any] | None = None,
        offsets: npt.NDArray[Any] | None = None,
        sub_scales: npt.NDArray[Any] | None = None,
        sub_offsets: npt.NDArray[Any] | None = None,
    ) -> None: ...

class Gating:
    def __init__(self, activation: int, interleaved: bool, alpha: float, limit: float) -> None: ...

class View:
    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        super: int,
        kind: int,
        scale_type: int,
        sub_scale_type: int,
        sub_offset_type: int,
        zp: int,
        rotation: int,
        codes: _Memory,
        scales: _Memory,
        sums: _Memory,
        zps: _Memory | None,
        offsets: _Memory | None,
        sub_scales: _Memory | None,
        sub_offsets: _Memory | None,
        table: _Memory | None,
        perm: _Memory | None,
        factors: _Memory | None,
    ) -> None: ...
    def try_plain(
        self,
        act: Any,
        act_scales: Any,
        act_zps: Any,
        scheme: int,
        bias: Any,
        gating: Gating | None,
        out: Any,
        threads: int,
        kernel: bytes | None,
    ) -> npt.NDArray[Any] | None: ...
    def linear(
        self,
        m: int,
        x: _Memory,
        x_type: int,
        scheme: int,
        bias: _Memory | None,
        out: _Memory,
        out_type: int,
        kernel: bytes | None,
        gating: Gating | None = None,
        threads: int = 0,
    ) -> None: ...
    def explain(self, m: int, scheme: int, kernel: bytes | None, threads: int) -> dict[str, Any]: ...
    def gemm(
        self,
        m: int,
        a: _Memory,
        a_type: int,
        a_scales: _Memory | None,
        a_zps: _Memory | None,
        bias: _Memory | None,
        out: _Memory,
        out_type: int,
        kernel: bytes | None,
    ) -> None: ...
    def unpack(
        self,
        codes: npt.NDArray[Any],
        scales: npt.NDArray[Any],
        zps: npt.NDArray[Any],
        offsets: npt.NDArray[Any] | None,
    ) -> None: ...
    def dequantize(self, columns: npt.NDArray[Any], out: npt.NDArray[Any]) -> None: ...

class ExpertsView:
    def __init__(self, whole: View, count: int, sizes: tuple[int, ...]) -> None: ...
    def grouped_linear(
        self,
        m: int,
        x: _Memory,
        x_type: int,
        scheme: int,
        rows_of_expert: _Memory,
        bias: _Memory | None,
        out: _Memory,
        out_type: int,
        kernel: bytes | None,
        gating: Gating | None = None,
    ) -> None: ...
    def moe(
        self,
        down: ExpertsView,
        m: int,
        slots: int,
        x: _Memory,
        x_type: int,
        scheme: int,
        ids: _Memory,
        weights: _Memory,
        scaling: float,
        gating: Gating,
        gate_up_bias: _Memory | None,
        down_bias: _Memory | None,
        out: _Memory,
        out_type: int,
        kernel: bytes | None,
    ) -> None: ...

class Places:
    def __init__(self, all: Iterable[Any], tensors: Iterable[Any]) -> None: ...
    def are(self, all: Iterable[Any]) -> bool: ...

def quantize_weight(
    n: int,
    k: int,
    group: int,
    super: int,
    values: npt.NDArray[Any],
    values_type: int,
    importance: npt.NDArray[Any] | None,
    zeros: int,
    codes: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    zps: npt.NDArray[Any] | None = None,
    offsets: npt.NDArray[Any] | None = None,
    sub_scales: npt.NDArray[Any] | None = None,
    sub_offsets: npt.NDArray[Any] | None = None,
) -> None: ...
def quantize_rows(
    m: int,
    k: int,
    x: npt.NDArray[Any],
    x_type: int,
    scheme: int,
    act: npt.NDArray[Any],
    act_scales: npt.NDArray[Any],
    act_zps: npt.NDArray[Any],
    kernel: bytes | None,
) -> None: ...
def kernel_table() -> list[tuple[str, str, str | None]]: ...
def default_kernel() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def thread_runtime() -> str: ...
def time_read(kernel: bytes | None, memory: npt.NDArray[Any], passes: int, streams: int, threads: int) -> int: ...
def time_dots(kernel: bytes | None, rounds: int, threads: int) -> tuple[int, int]: ...
def version() -> str: ...
def library_path() -> str: ...
