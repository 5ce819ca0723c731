#!/usr/bin/env python3
"""Checks that the objects of the kernels share no code: check_objects.py NM ARCHIVE...

An inline function of a header is a weak symbol in every object that uses it, and the linker keeps one
of them: the baseline code would then run the copy that was compiled for AVX-512.
"""

import subprocess
import sys
from pathlib import Path


def problems(nm: str, archive: str) -> list[str]:
    table = f"kernel_{Path(archive).stem.partition('kernel_')[2]}"
    only_global = f"_ZN5da8w4{len(table)}{table}E"  # da8w4::kernel_<name>
    found, defined = [], False
    listed = subprocess.run([nm, "--format=posix", archive], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        if line.endswith(":"):
            continue
        name, kind = line.split()[:2]
        if kind in "WwVvu":
            found.append(f"{name} is a weak symbol")
        elif kind == "U" and name.startswith("_Z"):
            found.append(f"{name} is used: kernels use the C library only")
        elif kind != "U" and kind.isupper() and name != only_global:
            found.append(f"{name} is a global symbol")
        defined = defined or (name == only_global and kind != "U")
    return found if defined else [*found, f"{only_global} is not there"]


def main() -> int:
    nm, *archives = sys.argv[1:]
    failed = 0
    for archive in archives:
        found = problems(nm, archive)
        print(f"{archive}: {len(found)} problems")
        print("".join(f"    {problem}\n" for problem in found), end="")
        failed += bool(found)
    return 1 if failed or not archives else 0


if __name__ == "__main__":
    sys.exit(main())
