"""Mixtures of experts, grouped products and gates equal the reference, bit for bit, whatever is chosen."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from cases import (
    DTYPES,
    KINDS,
    SOME,
    Weight,
    assert_same_bits,
    bias_of,
    expected_linear,
    floats,
    pack,
    pack_each,
    pack_experts,
    reference_experts,
    reference_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pyda8w4
from pyda8w4 import reference

F32 = np.float32
ACTS = ("uint8", "int8", "int8_group", "int16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")
EXPERTS = 4


@cache
def biases(count, n):
    return np.random.default_rng([count, n]).standard_normal((count, n), F32)


@cache
def routing(tokens, slots, experts, seed=0):
    """-> ids, of which some are -1 and some come twice in a token, and weights."""
    rng = np.random.default_rng([tokens, slots, experts, seed])
    ids = rng.integers(-1, experts, (tokens, slots), np.int32)
    return ids, rng.standard_normal((tokens, slots), F32)


def halves(y, interleaved=False):
    half = y.shape[-1] // 2
    return (y[..., ::2], y[..., 1::2]) if interleaved else (y[..., :half], y[..., half:])


def composed(x, gate_up, down, ids, weights, *, gate_up_bias=None, down_bias=None, act="uint8", scaling=1.0, **gating):
    """A mixture of `linear`, which equals the reference, and of the reference's gates and sums; float32."""
    interleaved = gating.pop("interleaved", False)
    results = np.zeros((*ids.shape, down.shape[1]), F32)
    for expert in range(len(gate_up)):
        chosen = ids == expert
        rows = x[np.nonzero(chosen)[0]]
        bias = None if gate_up_bias is None else gate_up_bias[expert]
        y = pyda8w4.linear(rows, gate_up[expert], bias, act=act, out_dtype=F32)
        h = reference.gate(*halves(y, interleaved), **gating)
        bias = None if down_bias is None else down_bias[expert]
        results[chosen] = pyda8w4.linear(h, down[expert], bias, act=act)
    return reference.sum_slots(results, weights, scaling, ids=ids)


# ---- kinds --------------------------------------------------------------------------------------


def pair(weight: Weight) -> tuple[Weight, Weight]:
    """Of one kind: gates and ups, and what takes them, of another number of outputs."""
    half = (weight.n + 1) // 2
    return replace(weight, n=2 * half), replace(weight, n=33, k=half)


@cache
def expected_of_kind(weight, act):
    gate_up, down = pair(weight)
    ids, weights = routing(13, 3, EXPERTS)
    return reference.moe(
        floats(gate_up.k)[:13],
        reference_experts(gate_up, EXPERTS),
        reference_experts(down, EXPERTS),
        ids,
        weights,
        gate_up_bias=biases(EXPERTS, gate_up.n),
        down_bias=biases(EXPERTS, down.n),
        routed_scaling=2.5,
        act=act,
    )


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", SOME + KINDS, ids=str)
def test_every_kind(kernel, weight, act):
    gate_up, down = pair(weight)
    ids, weights = routing(13, 3, EXPERTS)
    y = pyda8w4.moe(
        floats(gate_up.k)[:13],
        pack_experts(gate_up, EXPERTS),
        pack_experts(down, EXPERTS),
        ids,
        weights,
        gate_up_bias=biases(EXPERTS, gate_up.n),
        down_bias=biases(EXPERTS, down.n),
        routed_scaling=2.5,
        act=act,
    )
    assert_same_bits(y, expected_of_kind(weight, act))


@cache
def expected_groups(weight, act, out):
    """Of the rows 0, 1 and 2 to 12 of three experts."""
    return np.concatenate([
        reference.linear(
            floats(weight.k)[begin:end], bias=biases(EXPERTS, weight.n)[i], act=act, out_dtype=out, **expert
        )
        for (i, expert), (begin, end) in zip(
            enumerate(reference_experts(weight, EXPERTS)), ((0, 1), (1, 2), (2, 2), (2, 13)), strict=True
        )
    ])  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", SOME + KINDS, ids=str)
def test_groups_of_every_kind(kernel, weight, act):
    x, experts, bias = floats(weight.k)[:13], pack_experts(weight, EXPERTS), biases(EXPERTS, weight.n)
    for out in DTYPES:
        y = pyda8w4.grouped_linear(x, experts, [1, 1, 0, 11], bias, act=act, out_dtype=DTYPES[out])
        assert_same_bits(y, expected_groups(weight, act, out).view(y.dtype))


@pytest.mark.parametrize("weight", [weight for weight in SOME + KINDS if weight.n % 2 == 0], ids=str)
def test_gates_of_every_kind(kernel, weight):
    x, packed = floats(weight.k)[:9], pack(weight)
    for act in ACTS:
        for interleaved in (False, True):
            y = pyda8w4.linear_gated(x, packed, bias_of(weight.n), act=act, interleaved=interleaved)
            full = expected_linear(weight, act=act, bias=True)[:9]
            assert_same_bits(y, reference.gate(*halves(full, interleaved)), (act, interleaved))


def test_the_reference_of_gates_is_composed_of_its_parts():
    weight = Weight(34, 70, 32)
    arguments = {**reference_weight(weight), "group_size": 32}
    x = floats(70)[:5]
    y = reference.linear(x, bias=bias_of(34), act="int8", **arguments)
    for out in DTYPES:
        for interleaved in (False, True):
            got = reference.linear_gated(
                x, arguments, bias_of(34), act="int8", activation="silu", interleaved=interleaved, out_dtype=out
            )
            assert_same_bits(got, reference.convert(reference.gate(*halves(y, interleaved)), out))


# ---- numbers of tokens and slots ----------------------------------------------------------------

GATE_UP, DOWN = Weight(2 * 72, 70, 32, "float16"), Weight(65, 72, 32, "float16", offsets=True)
MANY = 8
TOKENS = 300


@cache
def slot_results():
    """What each slot of many tokens gives, in the reference."""
    x, (ids, _) = floats(GATE_UP.k, rows=TOKENS), routing(TOKENS, 8, MANY)
    results = np.zeros((TOKENS, 8, DOWN.n), F32)
    for expert in range(MANY):
        chosen = ids == expert
        h = reference.linear_gated(x[np.nonzero(chosen)[0]], reference_experts(GATE_UP, MANY)[expert])
        results[chosen] = reference.linear(h, **reference_experts(DOWN, MANY)[expert])
    return results


@pytest.mark.parametrize("slots", range(1, 9))
def test_every_number_of_tokens_and_slots(kernel, slots):
    x, (ids, weights) = floats(GATE_UP.k, rows=TOKENS), routing(TOKENS, 8, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    ids, weights = ids[:, :slots], weights[:, :slots]
    expected = reference.sum_slots(slot_results()[:, :slots], weights, ids=ids)
    for tokens in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 127, 128, 255, 256, 257, 300):
        y = pyda8w4.moe(x[:tokens], gate_up, down, ids[:tokens], weights[:tokens])
        assert_same_bits(y, expected[:tokens], tokens)


def test_a_token_does_not_depend_on_the_batch(kernel):
    x, (ids, weights) = floats(GATE_UP.k, rows=TOKENS), routing(TOKENS, 8, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    y = pyda8w4.moe(x, gate_up, down, ids, weights)
    for i in (0, 1, 77, 150, 299):
        assert_same_bits(pyda8w4.moe(x[i], gate_up, down, ids[i], weights[i]), y[i], i)
    order = np.random.default_rng(1).permutation(TOKENS)
    assert_same_bits(pyda8w4.moe(x[order], gate_up, down, ids[order], weights[order]), y[order])


@pytest.mark.parametrize("tokens", [1, 2, 5, 40, TOKENS])
def test_the_number_of_threads_changes_no_bit(kernel, threads, tokens):
    x, (ids, weights) = floats(GATE_UP.k, rows=TOKENS)[:tokens], routing(TOKENS, 8, MANY)
    ids, weights = ids[:tokens], weights[:tokens]
    counts = np.bincount(ids[:, 0] + 1, minlength=MANY + 1)[1:]
    rows = np.concatenate([x[ids[:, 0] == expert] for expert in range(MANY)])
    expected = reference.sum_slots(slot_results()[:tokens], weights, ids=ids)
    grouped = None
    for count in (1, 2, 3, 4, 7, 16):
        pyda8w4.set_num_threads(count)
        y = pyda8w4.moe(x, pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY), ids, weights)
        assert_same_bits(y, expected, count)
        y = pyda8w4.grouped_linear(rows, pack_experts(GATE_UP, MANY), counts)
        grouped = y if grouped is None else grouped
        assert_same_bits(y, grouped, count)


# ---- routing ------------------------------------------------------------------------------------


def skewed():
    rng = np.random.default_rng(0)
    yield "all on one expert", np.full((70, 1), 5)
    yield "all on the first expert, in all slots", np.zeros((20, 8), int)
    yield "one each", np.arange(MANY)[:, None]
    yield "one each, in the other order", np.arange(MANY)[::-1, None]
    yield "all experts for each token", np.tile(np.arange(MANY), (9, 1))
    yield "all experts for each token, in any order", rng.permuted(np.tile(np.arange(MANY), (40, 1)), axis=1)
    yield "nothing", np.full((7, 3), -1)
    yield "only the last token has something", np.r_[np.full((19, 2), -1), [[7, -1]]]
    yield "one expert has nearly all", np.where(rng.random((200, 2)) < 0.02, rng.integers(0, MANY, (200, 2)), 3)
    yield "a gap in the slots", np.array([[-1, 2, -1, 2, -1]])
    yield "the same twice", np.array([[4, 4], [4, 1], [1, 4], [1, 1]])


@pytest.mark.parametrize("ids", [pytest.param(ids.astype(np.int32), id=name) for name, ids in skewed()])
def test_skewed_routing(kernel, ids):
    weights = np.random.default_rng(2).standard_normal(ids.shape, F32)
    x = np.resize(floats(GATE_UP.k), (len(ids), GATE_UP.k))
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    y = pyda8w4.moe(x, gate_up, down, ids, weights)
    expected = reference.moe(x, reference_experts(GATE_UP, MANY), reference_experts(DOWN, MANY), ids, weights)
    assert_same_bits(y, expected)


@pytest.mark.parametrize("counts", [
    [70, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 70], [1] * 8, [0, 1, 2, 3, 4, 5, 6, 7], [40, 0, 1, 0, 2, 0, 0, 9],
    [0] * 8,
], ids=str)  # fmt: skip
def test_skewed_groups(kernel, counts):
    rows = sum(counts)
    x = floats(GATE_UP.k)[:rows]
    y = pyda8w4.grouped_linear(x, pack_experts(GATE_UP, MANY), np.array(counts))
    experts = np.repeat(np.arange(MANY), counts)
    assert y.shape == (rows, GATE_UP.n)
    for expert in set(experts.tolist()):
        own = experts == expert
        assert_same_bits(y[own], pyda8w4.linear(x[own], pack_each(GATE_UP, MANY)[expert]), expert)


def test_experts_that_are_not_here():
    # Ids of 20 experts, of which 8 are here, two of them under two ids.
    x, (_, weights) = floats(GATE_UP.k), routing(70, 4, 20)
    ids = routing(70, 4, 20)[0]
    expert_map = np.full(20, -1, np.int32)
    expert_map[[3, 4, 7, 9, 10, 13, 19, 0, 1, 2]] = [0, 1, 2, 3, 4, 5, 6, 7, 7, 0]
    local = np.where(ids < 0, -1, expert_map[ids])
    assert (local >= 0).any() and (local < 0).any()
    arguments = x, pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    expected = pyda8w4.moe(*arguments, local, weights)
    for dtype in (np.int32, np.int64):
        y = pyda8w4.moe(*arguments, ids.astype(dtype), weights, expert_map=expert_map.astype(dtype))
        assert_same_bits(y, expected)
    assert_same_bits(pyda8w4.moe(*arguments, local.astype(np.int64), weights), expected)
    found = reference.moe(
        x, reference_experts(GATE_UP, MANY), reference_experts(DOWN, MANY), ids, weights, expert_map=expert_map
    )
    assert_same_bits(found, expected)
    # Experts on two machines: each has those of its own.
    nobody = pyda8w4.moe(*arguments, ids, weights, expert_map=np.full(20, -1, np.int32))
    assert_same_bits(nobody, np.zeros_like(nobody))


# ---- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_every_size(kernel, activation, interleaved):
    gating = {"activation": activation, "alpha": 1.25, "limit": 0.75}
    for half in (1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100):
        gate_up, down = Weight(2 * half, 70, 32, "float16"), Weight(40, half, 16, "float16", 8)
        x = floats(70)[:11]
        y = pyda8w4.linear(x, pack(gate_up), bias_of(2 * half))
        expected = reference.gate(*halves(y, interleaved), **gating)
        for rows in (1, 2, 11):
            got = pyda8w4.linear_gated(x[:rows], pack(gate_up), bias_of(2 * half), interleaved=interleaved, **gating)
            assert_same_bits(got, expected[:rows], half)
        ids, weights = routing(11, 2, 3)
        operands = x, pack_experts(gate_up, 3), pack_experts(down, 3), ids, weights
        expected = composed(*operands, interleaved=interleaved, **gating)
        assert_same_bits(pyda8w4.moe(*operands, interleaved=interleaved, **gating), expected, half)


@pytest.mark.parametrize("out", list(DTYPES))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_types(kernel, dtype, out):
    x, (ids, weights) = floats(GATE_UP.k, dtype)[:30], routing(30, 3, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    y = pyda8w4.moe(x, gate_up, down, ids, weights, out_dtype=DTYPES[out])
    expected = composed(x, gate_up, down, ids, weights)
    assert_same_bits(y, reference.convert(expected, out).view(y.dtype))
    y = pyda8w4.linear_gated(x, gate_up[3], out_dtype=DTYPES[out])
    expected = reference.gate(*halves(pyda8w4.linear(x, gate_up[3], out_dtype=F32)))
    assert_same_bits(y, reference.convert(expected, out).view(y.dtype))
    if out == dtype:
        assert pyda8w4.moe(x, gate_up, down, ids, weights).dtype == DTYPES[out]
        assert pyda8w4.linear_gated(x, gate_up[3]).dtype == DTYPES[out]
        assert pyda8w4.grouped_linear(x[:8], gate_up, [1] * 8).dtype == DTYPES[out]


def test_nan_stays_in_its_token(kernel):
    x, (ids, weights) = floats(GATE_UP.k)[:40].copy(), routing(40, 3, MANY)
    ids, weights = ids.copy(), weights.copy()
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    clean = pyda8w4.moe(x, gate_up, down, ids, weights)
    x[3, 5], x[17, 0] = np.nan, -np.inf
    ids[[3, 17], 0] = 2
    ids[20], ids[21] = (1, -1, 1), (-1, -1, 4)
    weights[20, 1] = np.nan  # of a slot that adds nothing
    weights[21, 2] = np.nan
    y = pyda8w4.moe(x, gate_up, down, ids, weights)
    assert_same_bits(y, composed(x, gate_up, down, ids, weights))
    assert np.isnan(y[[3, 17, 21]]).all()
    assert np.isfinite(y[20]).all()
    others = np.setdiff1d(np.arange(40), [3, 17, 20, 21])
    assert_same_bits(y[others], clean[others])
    x[0] = np.nan
    y = pyda8w4.grouped_linear(x[:10], gate_up, [1, 2, 0, 0, 0, 0, 0, 7])
    assert np.isnan(y[[0, 3]]).all() and np.isfinite(np.delete(y, [0, 3], axis=0)).all()


# ---- anything -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(SOME + KINDS),
    st.sampled_from(SOME + KINDS),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 9),
    st.integers(0, 80),
    st.integers(0, 5),
    st.sampled_from(ACTS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def check_anything(gate_up, down, n, half, experts, tokens, slots, act, interleaved, biased, seed):
    gate_up, down = replace(gate_up, n=2 * half), replace(down, n=n, k=half)
    x = floats(gate_up.k, rows=80)[:tokens]
    ids, weights = routing(tokens, slots, experts, seed)
    more = {"interleaved": interleaved, "act": act}
    if biased:
        more |= {"gate_up_bias": biases(experts, 2 * half), "down_bias": biases(experts, n)}
    operands = x, pack_experts(gate_up, experts), pack_experts(down, experts), ids, weights
    assert_same_bits(pyda8w4.moe(*operands, **more), composed(*operands, **more))


def test_anything(kernel):
    check_anything()


@pytest.mark.parametrize("act", ACTS)
def test_long_inputs(kernel, act):
    # Of several K blocks in both products, and of more row blocks than one.
    gate_up, down = Weight(2 * 1300, 2051, 128, "float16"), Weight(40, 1300, 100, "float16", 8)
    for tokens, slots in ((1, 2), (6, 2), (300, 1)):
        ids, weights = routing(tokens, slots, 2)
        operands = floats(2051, rows=300)[:tokens], pack_experts(gate_up, 2), pack_experts(down, 2), ids, weights
        assert_same_bits(pyda8w4.moe(*operands, act=act), composed(*operands, act=act), (tokens, slots))


def test_a_call_leaves_nothing_behind_for_the_next(kernel):
    # They share a workspace.
    x, (ids, weights) = floats(GATE_UP.k, rows=TOKENS), routing(TOKENS, 8, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    first = {}
    for tokens in (300, 1, 20, 300, 2):
        for name, call in {
            "moe": lambda m: pyda8w4.moe(x[:m], gate_up, down, ids[:m], weights[:m]),
            "linear": lambda m: pyda8w4.linear(x[:m], gate_up[0]),
            "gated": lambda m: pyda8w4.linear_gated(x[:m], gate_up[1]),
            "grouped": lambda m: pyda8w4.grouped_linear(x[:m], gate_up, [0, m, 0, 0, 0, 0, 0, 0]),
        }.items():
            y = call(tokens)
            assert_same_bits(y, first.setdefault((name, tokens), y), (name, tokens))
    assert_same_bits(first["grouped", 300], pyda8w4.linear(x, gate_up[1]))


# ---- shapes and memory --------------------------------------------------------------------------


def test_shapes(kernel):
    x, (ids, weights) = floats(GATE_UP.k)[:24], routing(24, 2, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    y = pyda8w4.moe(x, gate_up, down, ids, weights)
    gated = pyda8w4.linear_gated(x, gate_up[0])
    for shape in ((24,), (4, 6), (2, 3, 4), (1, 24), (24, 1)):
        parts = [array.reshape(*shape, -1) for array in (x, ids, weights)]
        assert_same_bits(pyda8w4.moe(parts[0], gate_up, down, *parts[1:]), y.reshape(*shape, -1))
        assert_same_bits(pyda8w4.linear_gated(parts[0], gate_up[0]), gated.reshape(*shape, -1))
    for shape in ((0,), (3, 0), (0, 3)):
        empty = pyda8w4.moe(
            np.zeros((*shape, 70), F32), gate_up, down, np.zeros((*shape, 2), np.int32), np.zeros((*shape, 2), F32)
        )
        assert empty.shape == (*shape, DOWN.n)
        assert pyda8w4.linear_gated(np.zeros((*shape, 70), F32), gate_up[0]).shape == (*shape, 72)
    for rows in (x, x[0], x[:0]):
        none = pyda8w4.moe(
            rows, gate_up, down, np.zeros((*rows.shape[:-1], 0), np.int32), np.zeros((*rows.shape[:-1], 0), F32)
        )
        assert_same_bits(none, np.zeros((*rows.shape[:-1], DOWN.n), F32))
    assert pyda8w4.grouped_linear(x[:0], gate_up, [0] * 8).shape == (0, GATE_UP.n)
    assert_same_bits(pyda8w4.moe(x, gate_up, down, ids.tolist(), weights), y)


def test_out_is_filled(kernel):
    x, (ids, weights) = floats(GATE_UP.k)[:24], routing(24, 2, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    for call in (
        lambda **out: pyda8w4.moe(x, gate_up, down, ids, weights, **out),
        lambda **out: pyda8w4.linear_gated(x, gate_up[0], **out),
        lambda **out: pyda8w4.grouped_linear(x, gate_up, [3] * 8, **out),
    ):
        for dtype in DTYPES.values():
            expected = call(out_dtype=dtype)
            out = np.full_like(expected, 7)
            assert call(out=out) is out
            assert_same_bits(out, expected)


def every_other(array):
    wide = np.ones(tuple(2 * size for size in array.shape), array.dtype)
    part = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    part[...] = array
    return part


def shifted(array):
    memory = b"x" + array.tobytes()
    return np.frombuffer(memory, np.uint8)[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("variant", [every_other, shifted, np.asfortranarray])
def test_arrays_in_any_memory(kernel, variant):
    x, (ids, weights) = floats(GATE_UP.k)[:24], routing(24, 2, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    counts, bias = np.array([3] * 8, np.uint8), biases(MANY, GATE_UP.n)
    expected = pyda8w4.moe(x, gate_up, down, ids, weights, gate_up_bias=bias, down_bias=biases(MANY, DOWN.n))
    y = pyda8w4.moe(
        variant(x), gate_up, down, variant(ids), variant(weights), gate_up_bias=variant(bias),
        down_bias=variant(biases(MANY, DOWN.n)), expert_map=variant(np.arange(MANY)),
    )  # fmt: skip
    assert_same_bits(y, expected)
    expected = pyda8w4.moe(x, gate_up, down, ids, weights)
    for dtype in (np.int32, np.int64):
        y = pyda8w4.moe(variant(x), gate_up, down, variant(ids.astype(dtype)), variant(weights))
        assert_same_bits(y, expected, dtype)
    expected = pyda8w4.grouped_linear(x, gate_up, counts, bias)
    assert_same_bits(pyda8w4.grouped_linear(variant(x), gate_up, variant(counts), variant(bias)), expected)
    expected = pyda8w4.linear_gated(x, gate_up[0], bias[0])
    assert_same_bits(pyda8w4.linear_gated(variant(x), gate_up[0], variant(bias[0])), expected)


@pytest.mark.pitfall("general", "out aliases an input")
def test_out_that_overlaps_an_input_is_refused():
    memory = np.zeros(1 << 16, np.uint8)
    gate_up, down = pack_experts(Weight(128, 64, 32), 2), pack_experts(Weight(64, 64, 32), 2)
    out = memory[:1024].view(F32).reshape(4, 64)
    good = {
        "x": np.ones((4, 64), F32), "topk_ids": np.zeros((4, 2), np.int32), "topk_weights": np.ones((4, 2), F32),
        "gate_up_bias": np.zeros((2, 128), F32), "down_bias": np.zeros((2, 64), F32),
    }  # fmt: skip
    for name, array in good.items():
        inside = memory[1020 : 1020 + array.nbytes].view(array.dtype).reshape(array.shape)
        with pytest.raises(ValueError, match="out must not overlap"):
            pyda8w4.moe(gate_up=gate_up, down=down, **{**good, name: inside}, out=out)
    pyda8w4.moe(gate_up=gate_up, down=down, **good, out=out)
    good = {
        "x": np.ones((4, 64), F32), "rows_of_expert": np.array([4, 0], np.uintp), "bias": np.zeros((2, 64), F32),
    }  # fmt: skip
    for name in ("x", "bias"):
        inside = memory[1020 : 1020 + good[name].nbytes].view(F32).reshape(good[name].shape)
        with pytest.raises(ValueError, match="out must not overlap"):
            pyda8w4.grouped_linear(experts=down, **{**good, name: inside}, out=out)
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.linear_gated(memory[1020:1276].view(F32), gate_up[0], out=out[3])


@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_out_that_overlaps_the_experts_is_refused(which):
    weights = {"gate_up": pack_experts(Weight(64, 32, 16), 2), "down": pack_experts(Weight(32, 32, 16), 2)}
    memory = np.zeros((2, weights[which].shape[1]), F32)
    stored = {**weights[which]._arrays, "sums": memory.reshape(2, -1, 32)}
    weights[which] = pyda8w4.PackedExperts._from_arrays(weights[which]._format, stored)
    x, ids, ones = np.zeros((1, 32), F32), np.zeros((1, 1), np.int32), np.ones((1, 1), F32)
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.moe(x, weights["gate_up"], weights["down"], ids, ones, out=memory[1:, :32])
    with pytest.raises(ValueError, match="out must not overlap"):
        pyda8w4.grouped_linear(x, weights[which], [1, 0], out=memory[1:])


def test_inputs_are_not_changed():
    x, (ids, weights) = floats(GATE_UP.k)[:24].copy(), routing(24, 2, MANY)
    copies = x.copy(), ids.copy(), weights.copy()
    pyda8w4.moe(x, pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY), ids, weights, expert_map=np.arange(MANY))
    for array, was in zip((x, ids, weights), copies, strict=True):
        assert_same_bits(array, was)


def test_calls_from_several_threads(kernel):
    x, (ids, weights) = floats(GATE_UP.k, rows=TOKENS), routing(TOKENS, 8, MANY)
    gate_up, down = pack_experts(GATE_UP, MANY), pack_experts(DOWN, MANY)
    parts = [slice(begin, begin + 1 + begin % 7) for begin in range(0, 200, 5)]
    expected = pyda8w4.moe(x, gate_up, down, ids, weights)
    with ThreadPoolExecutor(4) as pool, pyda8w4.use_kernel(kernel):
        calls = [pool.submit(pyda8w4.moe, x[part], gate_up, down, ids[part], weights[part]) for part in parts]
        for part, done in zip(parts, calls, strict=True):
            assert_same_bits(done.result(), expected[part], part)
