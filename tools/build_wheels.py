#!/usr/bin/env python3
"""Builds, checks and tests the wheels of a release: build_wheels.py FOLDER [PYTHON...]

Zig compiles for glibc 2.17, so no container of an old Linux is needed. A Python from 3.11 on builds one wheel for all
such Pythons; 3.10 and free-threaded ones build their own. Without PYTHON, those that are on PATH or that pyenv has
are taken. One may be a script that emulates another architecture, such as tests/tools/emulated_python.sh makes: then
there is a wheel for that, too. Each wheel is repaired and checked, and installed beside nothing but numpy in a fresh
environment of each Python that takes it, where `pyda8w4 selftest` must pass. The digests that it prints must all be
equal, also to that of a build by the system's own compiler.

Needs the dependency group `wheels`: pip install --group wheels
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLIBC = (2, 17)
LIMITED_API = (3, 11)  # the first version whose limited API serves us: build_backend.py
MOST_BYTES = 1_500_000
CONTENTS = re.compile(
    r"pyda8w4/(\w+/)*\w+\.pyi?|pyda8w4/(py\.typed|libpyda8w4\.so|_core\.[\w-]+\.so|include/pyda8w4/pyda8w4\.h)"
    r"|pyda8w4/(pkgconfig/pyda8w4\.pc|cmake/pyda8w4Config(Version)?\.cmake)"
    r"|pyda8w4-[\d.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
)


class Failure(Exception):
    """What a wheel is not fit for."""


@dataclass
class Wheel:
    """A wheel in the folder, and what was seen of it."""

    path: Path
    policy: str
    tested: list[str] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Python:
    """An interpreter."""

    path: str
    version: tuple[int, int]
    free_threaded: bool
    architecture: str

    @property
    def has_limited_api(self) -> bool:
        return self.version >= LIMITED_API and not self.free_threaded

    @property
    def is_emulated(self) -> bool:
        return self.architecture != platform.machine()

    def takes(self, wheel: Path) -> bool:
        _, _, tag, abi, system = wheel.stem.split("-")
        number = f"cp{self.version[0]}{self.version[1]}"
        fits = self.has_limited_api if abi == "abi3" else (tag, abi) == (number, f"{number}{'t' * self.free_threaded}")
        return fits and system.endswith(self.architecture)

    def __str__(self) -> str:
        emulated = f" (emulated {self.architecture})" if self.is_emulated else ""
        return f"{self.version[0]}.{self.version[1]}{'t' * self.free_threaded}{emulated}"


def run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, cwd=cwd, env=os.environ | (environment or {}))
    if done.returncode:
        raise Failure(f"{shlex.join(parts)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def described(path: str) -> Python | None:
    """None for what is no Python, or one that the package does not support."""
    code = (
        "import platform, sys, sysconfig\n"
        "print(*sys.version_info[:2], bool(sysconfig.get_config_var('Py_GIL_DISABLED')), platform.machine())"
    )
    try:
        major, minor, free, architecture = run(path, "-c", code).split()
    except (Failure, OSError, ValueError):
        return None
    version = int(major), int(minor)
    return Python(path, version, free == "True", architecture) if version >= (3, 10) else None


def found_pythons() -> list[str]:
    on_path = [shutil.which(f"python3.{minor}{free}") for minor in range(10, 20) for free in ("", "t")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    return [path for path in on_path if path] + sorted(map(str, pyenv.glob("*/bin/python")))


def pythons(paths: list[str]) -> list[Python]:
    """One of each version, this one included."""
    one_of_each: dict[str, Python] = {}
    for path in paths or [sys.executable, *found_pythons()]:
        python = described(path)
        if python:
            one_of_each.setdefault(str(python), python)
    return sorted(one_of_each.values(), key=lambda python: (python.version, str(python)))


def zig() -> str:
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")


def build(source: Path, python: Python, architecture: str, work: Path) -> Path:
    """A wheel by Zig, as meson-python names it."""
    target = ["-target", f"{architecture}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"]
    compilers = {name: shlex.join([zig(), command, *target]) for name, command in (("CC", "cc"), ("CXX", "c++"))}
    # Without pkg-config, which gives headers of the system's Python that Zig, for another glibc, does not find all of.
    no_pkg_config = {"PKG_CONFIG_LIBDIR": str(work / "nothing")}
    environment = {**compilers, **no_pkg_config, "AR": shlex.join([zig(), "ar"]), "LDFLAGS": "-s"}
    options = ["--config-settings=abi3=true"]
    if architecture != platform.machine():
        cross_file = work / f"{architecture}.ini"
        cross_file.write_text(
            f"[binaries]\nc = {shlex.split(compilers['CC'])}\ncpp = {shlex.split(compilers['CXX'])}\n"
            f"ar = {[zig(), 'ar']}\n[built-in options]\nc_link_args = ['-s']\ncpp_link_args = ['-s']\n"
            f"[host_machine]\nsystem = 'linux'\nendian = 'little'\n"
            f"cpu_family = '{architecture}'\ncpu = '{architecture}'\n"
        )
        options.append(f"--config-settings=setup-args=--cross-file={cross_file}")
        environment = {**no_pkg_config, "_PYTHON_HOST_PLATFORM": f"linux-{architecture}"}
    return built(source, python, work / f"{python}-{architecture}", options, environment)


def built(source: Path, python: Python, folder: Path, options: list[str], environment: dict[str, str]) -> Path:
    run(python.path, "-m", "pip", "wheel", "--no-deps", *options, "-w", folder, source, environment=environment)
    return next(folder.glob("*.whl"))


def repaired(wheel: Path, architecture: str, folder: Path) -> Wheel:
    """The wheel in `folder`, under the name of the policy that it meets."""
    policy = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{architecture}"
    here = wheel.parent / "repaired"
    run("auditwheel", "repair", "-w", here, wheel)  # with --plat, it takes wheels of this architecture only
    path = Path(shutil.move(next(here.glob("*.whl")), folder / next(here.glob("*.whl")).name))
    said = run("auditwheel", "show", path)
    if policy not in said:
        raise Failure(f"{path.name} does not meet {policy}:\n{said}")
    return Wheel(path, policy)


def check(wheel: Path) -> None:
    run("twine", "check", "--strict", wheel)
    if "-abi3-" in wheel.name:
        run("abi3audit", "--strict", wheel)
    if wheel.stat().st_size > MOST_BYTES:
        raise Failure(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {MOST_BYTES}")
    names = (name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/"))
    strange = [name for name in names if not CONTENTS.fullmatch(name)]
    if strange:
        raise Failure(f"{wheel.name} holds {', '.join(strange)}")


def digests(python: Python, wheel: Path, work: Path) -> set[str]:
    """Those that `pyda8w4 selftest` prints, of a fresh environment with numpy alone."""
    numpy, environment = work / "numpy", work / "environment"
    for folder in (numpy, environment):
        shutil.rmtree(folder, ignore_errors=True)
    offline = ["-q", "--no-index", "--find-links", str(numpy), str(wheel)]
    command, variables = python.path, {}
    if python.is_emulated:  # pip runs here, where it is not emulated, so there is no environment but a folder
        for_it = ["--only-binary=:all:", f"--python-version={python.version[0]}.{python.version[1]}"]
        for_it += [f"--platform=manylinux_2_{minor}_{python.architecture}" for minor in (28, 27, 17)]
        run(sys.executable, "-m", "pip", "download", *for_it, "-d", numpy, "numpy")
        run(sys.executable, "-m", "pip", "install", "--target", environment, *for_it, *offline)
        variables = {"PYTHONPATH": str(environment)}
    else:
        run(python.path, "-m", "pip", "download", "--only-binary=:all:", "-d", numpy, "numpy")
        run(python.path, "-m", "venv", environment)
        command = str(environment / "bin" / "python")
        run(command, "-m", "pip", "install", *offline)
    said = run(command, "-m", "pyda8w4", "selftest", cwd=work, environment=variables)
    return set(re.findall(r"digest (\w+)", said))


def table(wheels: Iterable[Wheel]) -> str:
    lines = ["| wheel | bytes | policy | selftest passed on | digest |", "|---|---|---|---|---|"]
    for wheel in wheels:
        tested = ", ".join(wheel.tested) or "-"
        digest = ", ".join(sorted(wheel.digests)) or "-"
        lines.append(f"| `{wheel.path.name}` | {wheel.path.stat().st_size} | {wheel.policy} | {tested} | `{digest}` |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the wheels and the sdist go; made if it is missing")
    parser.add_argument("python", nargs="*", help="interpreters to build with and test on")
    arguments = parser.parse_args()
    folder, interpreters = arguments.folder.resolve(), pythons(arguments.python)
    folder.mkdir(parents=True, exist_ok=True)
    print("Pythons:", ", ".join(map(str, interpreters)))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
        source = max(folder.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
        run("twine", "check", "--strict", source)
        builders = [python for python in interpreters if not python.is_emulated]
        shared = next((python for python in builders if python.has_limited_api), None)
        jobs = [(python, platform.machine()) for python in builders if python == shared or not python.has_limited_api]
        emulated = {python.architecture for python in interpreters if python.is_emulated and python.has_limited_api}
        jobs += [(shared, architecture) for architecture in emulated if shared]
        wheels = []
        for python, architecture in jobs:
            wheel = repaired(build(source, python, architecture, work), architecture, folder)
            check(wheel.path)
            for tester in interpreters:
                if tester.takes(wheel.path):
                    wheel.digests |= digests(tester, wheel.path, work)
                    wheel.tested.append(str(tester))
            wheels.append(wheel)
            print(table([wheel]).splitlines()[-1], flush=True)
        of_own = digests(builders[-1], built(source, builders[-1], work / "own", [], {}), work)
        print(f"by the system's compiler: {', '.join(sorted(of_own))}\n\n{table(wheels)}")
        if len(of_own.union(*(wheel.digests for wheel in wheels))) != 1:
            raise Failure("the digests differ")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
