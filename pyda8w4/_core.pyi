from typing import Any

class CoreError(Exception): ...

class Memory:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Source:
    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        format: int,
        codes: Any,
        codes_stride: int,
        scales: Any,
        zps: Any,
        zp: int,
        offsets: Any,
    ) -> None: ...
    def plan_pack(self) -> tuple[int, int, int]: ...
    def pack(self, codes: Any, scales: Any, zps: Any, offsets: Any, sums: Any) -> None: ...

class View:
    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        scale_type: int,
        zp: int,
        codes: Any,
        scales: Any,
        zps: Any,
        offsets: Any,
        sums: Any,
    ) -> None: ...
    def overlaps(self, array: Any) -> bool: ...
    def unpack(self, codes: Any, scales: Any, zps: Any, offsets: Any) -> None: ...

def quantize_rows(
    x: Any, x_type: int, m: int, k: int, symmetric: bool, act: Any, scales: Any, zps: Any, kernel: bytes | None
) -> None: ...
def multiply(
    quantize: bool,
    m: int,
    act: Any,
    act_type: int,
    act_stride: int,
    act_scales: Any,
    act_zps: Any,
    symmetric: bool,
    weight: View,
    bias: Any,
    out: Any,
    out_type: int,
    out_stride: int,
    kernel: bytes | None,
) -> None: ...
def kernel_table() -> list[tuple[str, str, str | None]]: ...
def default_kernel() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def thread_runtime() -> str: ...
def version() -> str: ...
def library_path() -> str: ...
