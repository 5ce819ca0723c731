#!/usr/bin/env python3
"""Checks that the objects of the kernels share no code: check_objects.py NM ARCHIVE...

An inline function of a header is a weak symbol in every object that uses it, and the linker keeps one
of them: the baseline code would then run the copy that was compiled for AVX-512.
"""

import subprocess
import sys
from pathlib import Path


def kernel_of(archive: str) -> str:
    return Path(archive).stem.partition("kernel_")[2]


def mangled(*names: str) -> str:
    """How the symbols of this scope begin."""
    return "_ZN" + "".join(f"{len(name)}{name}" for name in names)


def problems(nm: str, archive: str, kernels: list[str]) -> list[str]:
    """A kernel has its table and functions in a namespace of its own name; it may use those of other kernels."""
    kernel = kernel_of(archive)
    table = f"{mangled('da8w4', f'kernel_{kernel}')}E"
    own = mangled("da8w4", kernel)
    others = tuple(mangled("da8w4", name) for name in kernels if name != kernel)
    found, defined = [], False
    listed = subprocess.run([nm, "--format=posix", archive], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        if line.endswith(":"):
            continue
        name, kind = line.split()[:2]
        if name.startswith("__x86.get_pc_thunk."):  # 32-bit x86: where the code is, the same in every object
            continue
        if kind in "WwVvu":
            found.append(f"{name} is a weak symbol")
        elif kind == "U" and name.startswith("_Z") and not name.startswith(others):
            found.append(f"{name} is used: kernels use the C library and other kernels only")
        elif kind != "U" and kind.isupper() and name != table and not name.startswith(own):
            found.append(f"{name} is a global symbol")
        defined = defined or (name == table and kind != "U")
    return found if defined else [*found, f"{table} is not there"]


def main() -> int:
    nm, *archives = sys.argv[1:]
    failed = 0
    for archive in archives:
        found = problems(nm, archive, [kernel_of(each) for each in archives])
        print(f"{archive}: {len(found)} problems")
        print("".join(f"    {problem}\n" for problem in found), end="")
        failed += bool(found)
    return 1 if failed or not archives else 0


if __name__ == "__main__":
    sys.exit(main())
