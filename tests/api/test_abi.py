"""The C interface as a C or C++ user meets it: the installed header and library, and a compiler."""

import ctypes
import importlib.metadata
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import pyda8w4

HEADER = Path(pyda8w4.get_include(), "pyda8w4", "pyda8w4.h")
LIBRARY = Path(pyda8w4.get_library())
TOOLS = Path(__file__).parents[1] / "tools"
EXAMPLE = Path(__file__).parents[2] / "examples" / "c"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
    return done.stdout


def tool(variable: str, name: str) -> str:
    """Return a program that the environment names, or that is installed; else skip."""
    named = os.environ.get(variable)
    found = shutil.which(named or name)
    assert found or not named, f"there is no {named}"
    if not found:
        pytest.skip(f"there is no {name}")
    return found


def test_program(tmp_path):
    program = tmp_path / "linear"
    compiler = tool("CC", "cc")
    source = EXAMPLE / "linear.c"
    rpath = f"-Wl,-rpath,{LIBRARY.parent}"
    run(compiler, "-std=c11", *STRICT, "-I", pyda8w4.get_include(), source, LIBRARY, rpath, "-o", program)
    check_output_of(program)


def check_output_of(program):
    lines = run(program).splitlines()
    assert len(lines) == 4
    for line in lines:
        value, expected = re.fullmatch(r"out\[\d\]\[\d\] = (.+), expected (.+)", line).groups()
        assert value == expected


def installed(folder_of):
    try:
        return folder_of()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_program_by_pkg_config(tmp_path, monkeypatch):
    pkg_config, compiler = tool("PKG_CONFIG", "pkg-config"), tool("CC", "cc")
    monkeypatch.setenv("PKG_CONFIG_PATH", installed(pyda8w4.get_pkgconfig_dir))
    assert run(pkg_config, "--modversion", "pyda8w4").strip() == pyda8w4.__version__
    options = run(pkg_config, "--cflags", "--libs", "pyda8w4").split()
    run(compiler, "-std=c99", *STRICT, EXAMPLE / "linear.c", *options, "-o", tmp_path / "linear")
    check_output_of(tmp_path / "linear")


def test_program_by_cmake(tmp_path):
    cmake = tool("CMAKE", "cmake")
    run(cmake, "-S", EXAMPLE, "-B", tmp_path, f"-Dpyda8w4_DIR={installed(pyda8w4.get_cmake_dir)}")
    run(cmake, "--build", tmp_path)
    check_output_of(tmp_path / "linear")


@pytest.mark.parametrize(("asked", "found"), [("0.1", True), ("0.1.0", True), ("0.0.9", False), ("0.2", False)])
def test_versions_that_cmake_takes(asked, found, tmp_path):
    cmake = tool("CMAKE", "cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.21)\nproject(version NONE)\nfind_package(pyda8w4 {asked})\n"
        f"if(NOT pyda8w4_FOUND STREQUAL {int(found)})\n  message(FATAL_ERROR unexpected)\nendif()\n"
    )
    run(cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-Dpyda8w4_DIR={installed(pyda8w4.get_cmake_dir)}")


def test_dlclose_with_idle_workers(tmp_path):
    program = tmp_path / "unload_program"
    source = TOOLS / "unload_program.c"
    run(tool("CC", "cc"), "-std=c11", *STRICT, "-I", pyda8w4.get_include(), source, "-ldl", "-o", program)
    assert run(program, LIBRARY) == "alive\n"


@pytest.mark.parametrize("standard", ["c99", "c11", "c17", "c2x", "c++11", "c++14", "c++17", "c++20", "c++23"])
def test_header_stands_alone(tmp_path, standard):
    language, variable, compiler = ("c++", "CXX", "c++") if "++" in standard else ("c", "CC", "cc")
    source = tmp_path / "alone"
    source.write_text("#include <pyda8w4/pyda8w4.h>\n")
    options = ["-x", language, f"-std={standard}", *STRICT, "-Wconversion", "-I", pyda8w4.get_include()]
    run(tool(variable, compiler), *options, "-fsyntax-only", source)


def test_memory_is_aligned_for_its_size():
    library = ctypes.CDLL(pyda8w4.get_library())
    library.da8w4_alloc.restype, library.da8w4_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.da8w4_free.restype, library.da8w4_free.argtypes = None, [ctypes.c_void_p]
    sizes = [0, 1, 63, 65, 2**16 - 1, 2**16, 2**16 + 1, 2**20, 2**21 - 1, 2**21, 2**21 + 1, 2**24]
    taken = [(size, library.da8w4_alloc(size)) for size in sizes * 3]
    for size, memory in taken:
        assert memory and memory % (2**21 if size >= 2**21 else 64) == 0, size
    assert len({memory for _, memory in taken}) == len(taken)
    for _, memory in taken:
        library.da8w4_free(memory)


def test_exported_symbols():
    declared = set(re.findall(r"DA8W4_API[^;(]*?\b(da8w4_\w+)\(", HEADER.read_text()))
    assert len(declared) > 10
    listed = run(tool("NM", "nm"), "-D", "--defined-only", "--format=posix", LIBRARY)
    exported = {line.split()[0] for line in listed.splitlines()}
    series = ".".join(pyda8w4.__version__.split(".")[:2])
    assert exported == {f"PYDA8W4_{series}", *(f"{name}@@PYDA8W4_{series}" for name in declared)}


@pytest.mark.skipif(struct.calcsize("P") != 8, reason="abi.txt has the sizes of 64-bit systems")
def test_compiled_programs_go_on_working():
    tool("CC", "cc")
    tests = Path(__file__).parents[1]
    found = run(sys.executable, tests.parent / "tools" / "abi.py")
    assert found == (tests / "native" / "abi.txt").read_text(), (
        "the C ABI has changed. If it should: python tools/abi.py > tests/native/abi.txt, and say so in CHANGELOG.md"
    )


def test_version():
    parts = re.findall(r"^#define DA8W4_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER.read_text(), re.MULTILINE)
    assert pyda8w4.__version__ == ".".join(parts) == importlib.metadata.version("pyda8w4")
