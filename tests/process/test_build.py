"""Builds of the sources on a machine that lacks something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("compilers", [(), ("cc",)], ids=["no compiler", "no C++ compiler"])
def test_a_missing_compiler_is_an_error_that_says_what_to_install(compilers, tmp_path):
    pytest.importorskip("mesonbuild", reason="meson is not installed")
    programs = {"python3": sys.executable}
    for name in compilers:
        programs |= {name: f"/usr/bin/{name}", "ar": "/usr/bin/ar", "ld": "/usr/bin/ld", "as": "/usr/bin/as"}
    (tmp_path / "bin").mkdir()
    for name, path in programs.items():
        if not Path(path).exists():
            pytest.skip(f"there is no {path}")
        (tmp_path / "bin" / name).symlink_to(path)
    meson = "from mesonbuild.mesonmain import main; import sys; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", meson, "setup", "-Dpython=false", str(tmp_path / "build"), str(ROOT)],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    error = next(line for line in done.stdout.splitlines() if "ERROR" in line)
    assert error.endswith(
        "pyda8w4 needs compilers of C and C++. On Debian and Ubuntu: apt-get install g++ python3-dev"
    ), done.stdout
