"""The timing method that `pyda8w4.bench` and benchmarks/ have in common."""

from __future__ import annotations

import os
from itertools import cycle

import pytest

from pyda8w4 import _timing


def add_cache(cpus, cpu: int, index: int, level: int, size: str, shared_by: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", f"{level}\n"), ("size", f"{size}\n"), ("shared_cpu_list", f"{shared_by}\n")):
        (folder / name).write_text(text)


@pytest.fixture
def cpus(tmp_path, monkeypatch):
    """Four CPUs; each pair shares a last-level cache of 16 MiB."""
    for cpu in range(4):
        pair = "0-1" if cpu < 2 else "2-3"
        add_cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        add_cache(tmp_path, cpu, 2, 2, "65536K", str(cpu))
        add_cache(tmp_path, cpu, 3, 3, "16384K", pair)
    monkeypatch.setattr(_timing, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return tmp_path


def test_last_level_cache_is_the_sum_of_its_parts(cpus):
    assert _timing.last_level_cache_bytes() == 2 * 16 << 20
    assert _timing.cold_bytes() == 4 * 32 << 20


def test_last_level_cache_leaves_out_cpus_of_others(cpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2})
    assert _timing.last_level_cache_bytes() == 16 << 20


def test_an_unknown_cache_is_taken_for_64_mib(tmp_path, monkeypatch):
    monkeypatch.setattr(_timing, "_CPUS", tmp_path)
    assert _timing.last_level_cache_bytes() is None
    assert _timing.cold_bytes() == 4 * 64 << 20


def test_cold_bytes_have_a_limit(cpus):
    for cpu in range(4):
        add_cache(cpus, cpu, 4, 4, "1048576K", "0-3")
    assert _timing.cold_bytes() == 700 << 20


@pytest.mark.parametrize(
    ("size", "total", "copies"), [(10, 0, 1), (10, 5, 1), (10, 100, 10), (10, 101, 11), (1, 1 << 30, 4096)]
)
def test_count_copies(size, total, copies):
    assert _timing.count_copies(size, total) == copies


def test_interleave_has_each_name_once_a_round_in_changing_order():
    names = list(_timing.interleave("abcd", rounds=20, settle=0))
    rounds = ["".join(names[i : i + 4]) for i in range(0, len(names), 4)]
    assert len(rounds) == 20
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 5
    assert names == list(_timing.interleave("abcd", rounds=20, settle=0))
    assert names != list(_timing.interleave("abcd", rounds=20, settle=0, seed=1))


def test_interleave_settles_before_each_run(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(_timing.time, "sleep", slept.append)
    for number, _ in enumerate(_timing.interleave("ab", rounds=2, settle=0.5), start=1):
        assert slept == [0.5] * number


@pytest.mark.parametrize(("call_seconds", "calls", "counted"), [(0.25, 4, 3), (5.0, 1, 1), (0.125, 8, 6)])
def test_time_calls_leaves_out_what_begins_in_the_first_fifth(monkeypatch, call_seconds, calls, counted):
    now = 0.0
    made = []

    def call(name):
        nonlocal now
        now += call_seconds
        made.append(name)

    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now)
    times = _timing.time_calls(cycle([lambda: call("first"), lambda: call("second")]), 1.0)
    assert times == [call_seconds] * counted
    assert made == (["first", "second"] * calls)[:calls]


def test_spread_has_median_and_quartiles():
    assert _timing.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == _timing.Spread(3.0, 2.0, 4.0, 5)
    assert _timing.Spread.of([7.0]) == _timing.Spread(7.0, 7.0, 7.0, 1)
    assert str(_timing.Spread(123.4, 0.01234, 1234.5, 9)) == "   123 [0.0123..1234]"
