"""What the compiler put into the library: instructions of an instruction set, only in the kernels for it."""

import ctypes
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import pytest

import pyda8w4

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for instructions of x86")


def descriptions() -> dict[str, str]:
    """Kernel: what it says of itself, by the C interface."""
    library = ctypes.CDLL(pyda8w4.get_library())
    describe = library.da8w4_kernel_description
    describe.argtypes, describe.restype = [ctypes.c_size_t], ctypes.c_char_p
    return {name: describe(index).decode() for index, name in enumerate(pyda8w4.kernels(runnable=False))}


DESCRIPTIONS = descriptions()
# Encoded like those that are allowed, but of extensions that no kernel asks for: VBMI, VBMI2, BITALG, VPOPCNTDQ, IFMA,
# FP16, BF16, GFNI, VAES, and AMX beyond int8.
OTHER = re.compile(
    r"vp(erm(b|[it]2b)|multishiftqb|(compress|expand)[bw]|sh[lr]dv?[wdq]|opcnt[bwdq]|shufbitqmb|madd52[lh]uq)"
    r"|v(?!cvtph2ps|cvtps2ph|extract|insert|broadcast)\w*(?<!u)(ph|sh)|v(dp|cvtne)\w*bf16\w*|vgf2p8\w+|vaes\w+|tdp(bf16|fp16)ps"
)
PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f0", "f2", "f3"}
# What each kernel may use beyond the baseline, whose code may use nothing of it.
MAY_USE = {
    "scalar": set(),
    "avx2": {"vex"},
    "avxvnni": {"vex", "vnni"},
    "avx512vnni": {"vex", "evex", "vnni"},
    "amx": {"vex", "evex", "vnni", "tile"},
}


def objdump(*options: str) -> list[str]:
    program = shutil.which("objdump")
    if not program:
        pytest.skip("there is no objdump")
    command = [program, *options, pyda8w4.get_library()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()


@cache
def source_of() -> dict[int, str]:
    """Address of each local function: the source file it is from. Kernels have these and those of their namespace."""
    owner, source = {}, ""
    for line in objdump("--syms"):
        found = re.fullmatch(r"([0-9a-f]+) (.{7}) (\S+)\t\S+\s*(.*)", line)
        if not found:
            continue
        address, flags, _, name = found.groups()
        if flags[5:] == "df":
            source = name
        elif flags.startswith("l") and flags.endswith("F"):
            kernels = [kernel for kernel in DESCRIPTIONS if name.startswith(f"_ZN5da8w4{len(kernel)}{kernel}")]
            owner[int(address, 16)] = kernel_source(kernels[0]) if kernels else source
    if not owner:
        pytest.skip("the library has no local symbols")
    return owner


@cache
def instructions() -> dict[str, list[tuple[str, str, str, frozenset[str]]]]:
    """Source file: mnemonic, operands, function and features of its instructions; "" for global functions."""
    owner, source, function = source_of(), "", ""
    found = defaultdict(list)
    for line in objdump("--disassemble"):
        if label := re.fullmatch(r"([0-9a-f]+) <(.+)>:", line):
            source, function = owner.get(int(label[1], 16), ""), label[2]
        elif code := re.fullmatch(r"\s+[0-9a-f]+:\t([0-9a-f ]+?)\s*\t(?:\{\w+\}\s+)?(\w+)(.*)", line):
            features = frozenset(features_of(code[1].split(), code[2]))
            found[source].append((code[2], code[3].strip(), function, features))
    return found


def features_of(encoding: list[str], mnemonic: str) -> Iterator[str]:
    """What an instruction needs beyond the baseline. The first byte after prefixes says how it is encoded."""
    first = next((byte for byte in encoding if byte not in PREFIXES), "")
    if first in ("c4", "c5"):
        yield "vex"  # AVX to AVX2, FMA, F16C, BMI, mask registers, tiles
    if first == "62":
        yield "evex"  # AVX-512
    if mnemonic.startswith("vpdp"):
        yield "vnni"
    if mnemonic.startswith(("tile", "tdp", "ldtilecfg", "sttilecfg")):
        yield "tile"
    if OTHER.fullmatch(mnemonic):
        yield "other"


def kernel_source(name: str) -> str:
    return f"{name}.cpp"


def leaks(source: str, allowed: set[str]) -> set[tuple[str, str, str]]:
    return {(source, function, mnemonic) for mnemonic, _, function, needs in instructions()[source] if needs - allowed}


def test_the_library_needs_no_libstdcxx():
    # Of which each compiler brings a newer version than the machines have on which a build is to run.
    needed = [line.split()[1] for line in objdump("--private-headers") if line.split()[:1] == ["NEEDED"]]
    if any("san.so" in name or "clang_rt" in name for name in needed):
        pytest.skip("sanitizers need it")
    assert needed and not [name for name in needed if "c++" in name or "libgcc" in name]


def test_baseline_code_has_no_avx():
    kernels = {kernel_source(name) for name in DESCRIPTIONS}
    assert set(instructions()) > kernels
    assert not set().union(*(leaks(source, set()) for source in set(instructions()) - kernels))


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_kernel_stays_within_its_instruction_set(name):
    assert not leaks(kernel_source(name), MAY_USE[name])


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_kernel_has_the_instruction_it_is_named_for(name):
    described = re.search(r"(\d+)-bit (v\w+)", DESCRIPTIONS[name])
    if not described:
        pytest.skip("its description names no instruction")
    code = instructions()[kernel_source(name)]
    register = {"256": "%ymm", "512": "%zmm"}[described[1]]
    assert sum(mnemonic == described[2] and register in operands for mnemonic, operands, _, _ in code) > 10
