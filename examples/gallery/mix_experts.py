"""
A mixture of experts in one call
================================

In a mixture of experts each token takes a few of many feed-forward layers, the experts, and adds up what these give.
:func:`pyda8w4.moe` is that whole layer: the products of all experts, the function of their gates, and the weighted sum.
"""

import time

import numpy as np

import pyda8w4

rng = np.random.default_rng(0)
EXPERTS, SLOTS, HIDDEN, INNER, TOKENS = 16, 4, 512, 256, 32

# %%
# The experts
# -----------
#
# Each expert has three matrices. Gates and ups share their input, so they are one: ``concat`` joins them without
# packing them again, and ``stack`` makes one object of all experts.


def random_weight(n, k):
    return pyda8w4.quantize(rng.standard_normal((n, k), dtype=np.float32) / np.float32(k**0.5), group_size=64)


gate_up = pyda8w4.stack(
    [pyda8w4.concat([random_weight(INNER, HIDDEN), random_weight(INNER, HIDDEN)]) for _ in range(EXPERTS)]
)
down = pyda8w4.stack([random_weight(HIDDEN, INNER) for _ in range(EXPERTS)])
print(gate_up)
print(down)

# %%
# The router
# ----------
#
# A router is small, and stays in float. It gives the experts of each token, and what each of them counts.

x = rng.standard_normal((TOKENS, HIDDEN), dtype=np.float32)
router = rng.standard_normal((EXPERTS, HIDDEN), dtype=np.float32) / np.float32(HIDDEN**0.5)
scores = x @ router.T
topk_ids = np.argsort(-scores, axis=1)[:, :SLOTS]
topk_weights = np.exp(np.take_along_axis(scores, topk_ids, axis=1))
topk_weights /= topk_weights.sum(axis=1, keepdims=True)
print("experts of the first token:", topk_ids[0], "with", topk_weights[0].round(2))

# %%
# The layer
# ---------

y = pyda8w4.moe(x, gate_up, down, topk_ids, topk_weights)
print(y.shape, y.dtype)

# %%
# The same in a loop over the experts, each with the rows that chose it. The results agree up to the order in which a
# token's experts are added.


def in_a_loop():
    out = np.zeros_like(x)
    for expert in range(EXPERTS):
        tokens, slots = np.nonzero(topk_ids == expert)
        if tokens.size:
            inner = pyda8w4.linear_gated(x[tokens], gate_up[expert])
            out[tokens] += topk_weights[tokens, slots, None] * pyda8w4.linear(inner, down[expert])
    return out


print(f"largest difference: {np.abs(y - in_a_loop()).max():.1e}, of numbers up to {np.abs(y).max():.2f}")

# %%
# One call quantizes each token once, and lets no thread wait at the end of an expert.


def milliseconds(function):
    """The best of some runs."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


one_call = milliseconds(lambda: pyda8w4.moe(x, gate_up, down, topk_ids, topk_weights))
print(f"one call {one_call:.2f} ms, the loop {milliseconds(in_a_loop):.2f} ms")

# %%
# Experts of other processes
# --------------------------
#
# Where processes divide the experts among themselves, a map says which of a layer's experts each has, and its results
# are added up. Here the first eight are in one place, and the others in another.

parts = [
    pyda8w4.moe(x, gate_up[part], down[part], topk_ids, topk_weights, expert_map=np.where(here, order, -1))
    for part, here, order in (
        (slice(0, 8), np.arange(EXPERTS) < 8, np.arange(EXPERTS)),
        (slice(8, 16), np.arange(EXPERTS) >= 8, np.arange(EXPERTS) - 8),
    )
]
print(f"largest difference: {np.abs(y - sum(parts)).max():.1e}")
