"""Builds of the sources on a machine that lacks something."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize("given", [None, {"setup-args": "-Dx=1"}, {"setup-args": ["-Dx=1"], "abi3": "true"}])
@pytest.mark.parametrize("has_it", [True, False], ids=["3.11 and later", "3.10 and free-threaded"])
@pytest.mark.parametrize("hook", ["build_sdist", "build_wheel", "build_editable"])
def test_the_limited_api_is_used_where_it_is_wanted_and_serves_us(hook, has_it, given, monkeypatch):
    hooks = dict.fromkeys(f"get_requires_for_build_{what}" for what in ("editable", "sdist", "wheel"))
    monkeypatch.setitem(sys.modules, "mesonpy", SimpleNamespace(**hooks, **{hook: lambda *arguments: arguments}))
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "tools" / "build_backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    assert (sys.version_info >= (3, 11) and not free_threaded) == backend.HAS_LIMITED_API
    monkeypatch.setattr(backend, "HAS_LIMITED_API", has_it)
    folder, settings, *_ = getattr(backend, hook)("out", given)
    used = has_it and bool(given) and "abi3" in given
    options = ([] if given is None else ["-Dx=1"]) + ([] if used else ["-Dpython.allow_limited_api=false"])
    assert (folder, settings) == ("out", {"setup-args": options})
