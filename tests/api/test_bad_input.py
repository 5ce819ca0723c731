"""A bad argument is a TypeError or ValueError that names it, and nothing is written to `out` before."""

import inspect
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import Weight, arrays, assert_same_bits, floats, given, pack, pack_experts, quantized

import pyda8w4

WEIGHT = Weight(33, 64, 32)
ROWS = 3
CANARY = 12345.5


def good_linear():
    return {"x": floats(64)[:ROWS], "packed": pack(WEIGHT), "bias": np.zeros(33, np.float32)}


def good_gemm():
    a, a_scales, a_zps = (array[:ROWS] for array in quantized(64, "uint8"))
    return {"a": a, "packed": pack(WEIGHT), "a_scales": a_scales, "a_zps": a_zps, "bias": np.zeros(33, np.float32)}


def good_prepack():
    return dict(zip(("codes", "scales", "zps", "offsets"), arrays(replace(WEIGHT, offsets=True)), strict=True))


RICH = Weight(33, 64, 8, "float16", 0, True, table=True, supers=4, perm=True, factors=True)


def good_rich_prepack():
    return dict(given(RICH))


EXPERTS = 3


def good_grouped_linear():
    return {
        "x": floats(64)[:ROWS],
        "experts": pack_experts(WEIGHT, EXPERTS),
        "rows_of_expert": np.array([2, 0, 1]),
        "bias": np.zeros((EXPERTS, 33), np.float32),
    }


GATE_UP, DOWN = Weight(66, 64, 32), Weight(33, 33, 16)


def good_linear_gated():
    return {"x": floats(64)[:ROWS], "gate_up": pack(GATE_UP), "bias": np.zeros(66, np.float32)}


def good_moe():
    return {
        "x": floats(64)[:ROWS],
        "gate_up": pack_experts(GATE_UP, EXPERTS),
        "down": pack_experts(DOWN, EXPERTS),
        "topk_ids": np.array([[0, 1], [2, -1], [1, 1]]),
        "topk_weights": np.ones((ROWS, 2), np.float32),
        "gate_up_bias": np.zeros((EXPERTS, 66), np.float32),
        "down_bias": np.zeros((EXPERTS, 33), np.float32),
    }


def good_expert_map():
    return {**good_moe(), "topk_ids": np.array([[9, 1], [2, -1], [1, 1]], np.int32), "expert_map": np.arange(10) // 4}


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def swapped(array):
    """The same values in the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def with_value(array, value, dtype=None):
    array = array.astype(dtype or array.dtype)
    array.flat[-1] = value
    return array


RAGGED = [[1.0, 2.0], [3.0]]
NO_FLOATS = [
    (ones(ROWS, 64, dtype=np.float64), TypeError),
    (ones(ROWS, 64, dtype=np.int8), TypeError),
    (ones(ROWS, 64, dtype=np.complex64), TypeError),
    (ones(ROWS, 64, dtype=np.bool_), TypeError),
    (ones(ROWS, 64, dtype=ml_dtypes.float8_e4m3fn), TypeError),
    (swapped(ones(ROWS, 64)), TypeError),
    (ones(ROWS, 64).astype(object), TypeError),
    ([["a"] * 64], TypeError),
    (RAGGED, ValueError),
    (1.5, TypeError),
    (None, TypeError),
    ("text", TypeError),
]
ROWS_THAT_DO_NOT_FIT = [
    (ones(ROWS, 63), ValueError),
    (ones(ROWS, 65), ValueError),
    (ones(64, ROWS), ValueError),
    (ones(ROWS, 0), ValueError),
    (np.float32(1), ValueError),
]
BAD_PACKED = [(None, TypeError), (ones(33, 64), TypeError), ("packed", TypeError), (arrays(WEIGHT), TypeError)]
BAD_BIAS = [
    (ones(32), ValueError),
    (ones(34), ValueError),
    (ones(33, 1), ValueError),
    (ones(1), ValueError),
    (np.float32(1), ValueError),
    (ones(33, dtype=np.float64), TypeError),
    (ones(33, dtype=np.float16), TypeError),
    (swapped(ones(33)), TypeError),
    (["a"] * 33, TypeError),
    (RAGGED, ValueError),
    (ones(33).astype(object), TypeError),
]
BAD_OUT_DTYPE = [
    (np.float64, TypeError),
    ("int8", TypeError),
    ("nonsense", TypeError),
    (3, TypeError),
    (">f4", TypeError),
]
READ_ONLY = ones(ROWS, 33)
READ_ONLY.flags.writeable = False
BAD_OUT = [
    (ones(ROWS, 32), ValueError),
    (ones(ROWS + 1, 33), ValueError),
    (ones(ROWS * 33), ValueError),
    (ones(1, ROWS, 33), ValueError),
    (ones(33, ROWS).T, ValueError),
    (ones(ROWS, 66)[:, ::2], ValueError),
    (ones(ROWS, 40)[:, :33], ValueError),
    (ones(ROWS, 33)[::-1], ValueError),
    (READ_ONLY, ValueError),
    (ones(ROWS, 33, dtype=np.float64), TypeError),
    (swapped(ones(ROWS, 33)), TypeError),
    (ones(ROWS, 33, dtype=np.int32), TypeError),
    ([[0.0] * 33] * ROWS, TypeError),
    ("out", TypeError),
]
A = good_gemm()["a"]
BAD_A = [
    (A.astype(np.int16), TypeError),
    (A.astype(np.float32), TypeError),
    (A.astype(np.bool_), TypeError),
    (A.astype(object), TypeError),
    (A.tolist(), TypeError),
    (RAGGED, ValueError),
    (3, TypeError),
    (np.uint8(3), ValueError),
    (None, TypeError),
    (A[:, :63], ValueError),
    (np.hstack([A, A]), ValueError),
]
BAD_A_SCALES = [
    (ones(ROWS - 1), ValueError),
    (ones(ROWS, 1), ValueError),
    (np.float32(1), ValueError),
    (ones(ROWS, dtype=np.float64), TypeError),
    (ones(ROWS, dtype=np.float16), TypeError),
    (swapped(ones(ROWS)), TypeError),
    (0.5, TypeError),
    (ones(ROWS).astype(object), TypeError),
]
ZPS = good_gemm()["a_zps"]
BAD_A_ZPS = [
    (ZPS[1:], ValueError),
    (ZPS[:, None], ValueError),
    (np.int32(1), ValueError),
    (ZPS.astype(np.int64), TypeError),
    (ZPS.astype(np.uint8), TypeError),
    (ZPS.astype(np.float32), TypeError),
    (swapped(ZPS), TypeError),
    (with_value(ZPS, -1), ValueError),
    (with_value(ZPS, 256), ValueError),
    (with_value(ZPS, 2**31 - 1), ValueError),
    (with_value(ZPS, -(2**31)), ValueError),
]
CODES, SCALES, WEIGHT_ZPS = arrays(WEIGHT)
SIGNED = CODES.astype(np.int8) - np.int8(8)
BAD_W = [
    (CODES.astype(np.int32), TypeError),
    (CODES.astype(np.float32), TypeError),
    (CODES.astype(object), TypeError),
    (CODES.astype(np.bool_), TypeError),
    (CODES.tolist(), TypeError),
    (RAGGED, ValueError),
    ([["a"]], TypeError),
    (None, TypeError),
    (3, ValueError),
    (CODES[0], ValueError),
    (CODES[None], ValueError),
    (CODES[:0], ValueError),
    (CODES[:, :0], ValueError),
    (with_value(CODES, 16), ValueError),
    (with_value(CODES, 255), ValueError),
    (with_value(SIGNED, 8), ValueError),
    (with_value(SIGNED, -9), ValueError),
]
BAD_SCALES = [
    (SCALES.astype(np.float64), TypeError),
    (SCALES.astype(np.int32), TypeError),
    (swapped(SCALES), TypeError),
    (RAGGED, ValueError),
    (SCALES.astype(object), TypeError),
    (None, TypeError),
    (1.0, TypeError),
    (np.float32(1), ValueError),
    (SCALES[1:], ValueError),
    (SCALES.T, ValueError),
    (SCALES[:, :0], ValueError),
    (SCALES[..., None], ValueError),
    (ones(33, 63), ValueError),
    (ones(33, 65), ValueError),
    (with_value(SCALES, np.nan), ValueError),
    (with_value(SCALES, np.inf), ValueError),
    (with_value(SCALES, -np.inf), ValueError),
    (with_value(SCALES, np.inf, np.float16), ValueError),
]
BAD_WEIGHT_ZPS = [
    (WEIGHT_ZPS.astype(np.float32), TypeError),
    (WEIGHT_ZPS.astype(np.bool_), TypeError),
    (WEIGHT_ZPS.astype(object), TypeError),
    (["a"] * 33, TypeError),
    (RAGGED, ValueError),
    (8, ValueError),
    (WEIGHT_ZPS[1:], ValueError),
    (WEIGHT_ZPS[:, :1], ValueError),
    (WEIGHT_ZPS.T, ValueError),
    (with_value(WEIGHT_ZPS, 128, np.int16), ValueError),
    (with_value(WEIGHT_ZPS, 255, np.uint8), ValueError),
    (with_value(WEIGHT_ZPS, -129, np.int64), ValueError),
    (np.full((33, 2), 2**63, np.uint64), ValueError),
]
BAD_OFFSETS = [case for case in BAD_SCALES if case[0] is not None] + [
    (ones(33, 1), ValueError),
    (ones(33, 4), ValueError),
    (ones(33), ValueError),
]
BAD_BITS = [
    *((bits, ValueError) for bits in (0, 3, 7, 9, -4)),
    *((bits, TypeError) for bits in (4.0, "4", True, None)),
]
RICH_CODES = given(RICH)["codes"]
BAD_SUBS = [
    (ones(33, 8), TypeError),
    (ones(33, 8, dtype=np.int16), TypeError),
    (ones(33, 8, dtype=np.bool_), TypeError),
    (ones(32, 8, dtype=np.uint8), ValueError),
    (ones(33, 0, dtype=np.uint8), ValueError),
    (ones(33, 8, 1, dtype=np.uint8), ValueError),
    ([[1] * 8] * 33, TypeError),
    (1, TypeError),
]
BAD_GROUP_SIZE = [
    (0, ValueError),
    (-4, ValueError),
    (30, ValueError),
    (3, ValueError),
    (32.0, TypeError),
    ("32", TypeError),
    (True, TypeError),
]
BAD_ACT = [
    ("int4", ValueError),
    ("UINT8", ValueError),
    ("", ValueError),
    (np.int8, TypeError),
    (True, TypeError),
    (None, TypeError),
    (0, TypeError),
    (["uint8"], TypeError),
]
BAD_FLAG = [("False", TypeError), (1, TypeError), (None, TypeError)]
BAD_EXPERTS = [
    (None, TypeError),
    (pack(WEIGHT), TypeError),
    ([pack(WEIGHT)], TypeError),
    (ones(EXPERTS, 33, 64), TypeError),
    ("experts", TypeError),
]
BAD_NUMBER = [
    (np.nan, ValueError),
    (np.inf, ValueError),
    (-np.inf, ValueError),
    (1e39, ValueError),
    (10**400, ValueError),
    (np.float64(-1e300), ValueError),
    ("1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (ones(1), TypeError),
    (1j, TypeError),
]
BAD_GATING = {
    "activation": [
        ("relu", ValueError), ("SiLU", ValueError), ("", ValueError), (None, TypeError), (0, TypeError),
        (abs, TypeError),
    ],
    "interleaved": BAD_FLAG,
    "alpha": BAD_NUMBER,
    "limit": [*BAD_NUMBER, (0.0, ValueError), (-7, ValueError), (-0.0, ValueError)],
}  # fmt: skip
IDS = good_moe()["topk_ids"]


def bad_ids(count, shape):
    return [
        (np.full(shape, count), ValueError),
        (with_value(np.zeros(shape, np.int32), count), ValueError),
        (with_value(np.zeros(shape, np.int32), -2), ValueError),
        (with_value(np.zeros(shape, np.int64), -2), ValueError),
        (with_value(np.zeros(shape, np.int32), 2**31 - 1), ValueError),
        (with_value(np.zeros(shape, np.int64), 2**32), ValueError),
        (with_value(np.zeros(shape, np.int64), -(2**63)), ValueError),
        (np.zeros(shape, np.uint32), TypeError),
        (np.zeros(shape, np.int16), TypeError),
        (np.zeros(shape, np.float32), TypeError),
        (np.zeros(shape, np.bool_), TypeError),
        (swapped(np.zeros(shape, np.int32)), TypeError),
        (np.zeros(shape).astype(object), TypeError),
        (RAGGED, ValueError),
        ("ids", TypeError),
    ]


def bad_bias(*shape):
    return [
        (ones(*shape[:-1], shape[-1] - 1), ValueError),
        (ones(*shape[:-1], shape[-1] + 1), ValueError),
        (ones(shape[0] + 1, *shape[1:]), ValueError),
        (ones(shape[-1]), ValueError),
        (ones(*shape, 1), ValueError),
        (ones(*shape, dtype=np.float64), TypeError),
        (ones(*shape, dtype=np.float16), TypeError),
        (swapped(ones(*shape)), TypeError),
        (RAGGED, ValueError),
    ]


TABLE = [
    ("linear", good_linear, {
        "x": NO_FLOATS + ROWS_THAT_DO_NOT_FIT, "packed": BAD_PACKED, "bias": BAD_BIAS, "out_dtype": BAD_OUT_DTYPE,
        "out": BAD_OUT, "act": BAD_ACT,
    }),
    ("gemm", good_gemm, {
        "a": BAD_A, "packed": BAD_PACKED, "a_scales": BAD_A_SCALES, "a_zps": BAD_A_ZPS, "bias": BAD_BIAS,
        "out_dtype": BAD_OUT_DTYPE, "out": BAD_OUT,
    }),
    ("quantize_activation", lambda: {"x": floats(64)[:ROWS]}, {
        "x": [*NO_FLOATS, (ones(ROWS, 0), ValueError), (np.float32(1), ValueError)],
        "act": [*BAD_ACT, ("int8_group", ValueError), ("int16", ValueError)],
    }),
    ("quantize_weight", lambda: {"w": floats(64)[:ROWS]}, {
        "w": [
            *NO_FLOATS, (ones(64), ValueError), (ones(1, 1, 64), ValueError), (ones(0, 64), ValueError),
            (ones(ROWS, 0), ValueError), (with_value(ones(ROWS, 64), np.nan), ValueError),
            (with_value(ones(ROWS, 64), -np.inf), ValueError),
            (with_value(ones(ROWS, 64), np.inf, np.float16), ValueError),
            (np.tile(np.float32([3e38, -3e38]), (ROWS, 32)), ValueError),
        ],
        "group_size": [*BAD_GROUP_SIZE, (None, TypeError)],
        "method": [("rtn", ValueError), (None, TypeError), (1, TypeError)],
        "zeros": [("symmetric", ValueError), (None, TypeError), (False, TypeError)],
        "importance": [
            (ones(63), ValueError), (ones(1, 64), ValueError), (np.zeros(64), ValueError), (-ones(64), ValueError),
            (with_value(ones(64), np.nan), ValueError), (with_value(ones(64), np.inf), ValueError),
            (np.ones(64, bool), TypeError), (np.ones(64, complex), TypeError), ("a", TypeError),
        ],
        "two_level": BAD_FLAG,
        "rotate": [
            (1, ValueError), (3, ValueError), (-32, ValueError), (2048, ValueError), (2.0, TypeError), ("a", TypeError),
        ],
    }),
    ("quantize_weight", lambda: {"w": floats(64)[:ROWS], "method": "minmax"}, {
        "w": [
            (with_value(ones(ROWS, 64), np.nan), ValueError), (with_value(ones(ROWS, 64), -np.inf), ValueError),
            (np.tile(np.float32([3e38, -3e38]), (ROWS, 32)), ValueError),
        ],
        "importance": [(ones(64), ValueError)],
        "two_level": [(True, ValueError)],
    }),
    ("quantize_weight", lambda: {"w": floats(64)[:ROWS], "method": "minmax", "zeros": "none"}, {
        "w": [(np.full((1, 8), -3.4e38, np.float32), ValueError)],
    }),
    ("prepack", good_prepack, {
        "codes": BAD_W, "scales": BAD_SCALES, "zps": BAD_WEIGHT_ZPS, "offsets": BAD_OFFSETS,
        "group_size": [*BAD_GROUP_SIZE, (64, ValueError), (16, ValueError)],
        "nibbles": [("low", ValueError), (True, ValueError), (0, ValueError)],
        "bits": BAD_BITS,
        "sub_offsets": [(ones(33, 2, dtype=np.uint8), ValueError)],
        "sub_scales": [(ones(33, 2, dtype=np.uint8), ValueError)],
    }),
    ("prepack", good_rich_prepack, {
        "bits": [(5, ValueError), (8, ValueError)],
        "codes": [(RICH_CODES.astype(np.int8), TypeError), (with_value(RICH_CODES, 16), ValueError)],
        "zps": [(np.ones((33, 8), np.int8), ValueError)],
        "scales": [
            (ones(33, 5), ValueError), (ones(33, 9), ValueError), (np.full((33, 2), 1.1, np.float32), ValueError),
            (np.full((33, 2), 3e38, np.float32), ValueError),
        ],
        "offsets": [(np.full((33, 2), 1.1, np.float32), ValueError), (ones(33, 8), ValueError), (None, ValueError)],
        "sub_scales": [*BAD_SUBS, (None, ValueError)],
        "sub_offsets": [*BAD_SUBS, (None, ValueError), (given(RICH)["sub_offsets"][:, :7], ValueError)],
        "table": [
            (np.zeros(15, np.int8), ValueError), (np.zeros((1, 16), np.int8), ValueError), (np.zeros(16), TypeError),
            (np.full(16, 128), ValueError), (np.full(16, -129), ValueError), (np.zeros(16, bool), TypeError),
            (7, ValueError), ("table", TypeError),
        ],
        "perm": [
            (np.zeros(64, np.int32), ValueError), (np.arange(63), ValueError), (np.arange(1, 65), ValueError),
            (np.arange(64) - 1, ValueError), (np.arange(64.0), TypeError), (np.arange(64)[None], ValueError),
            (np.r_[np.arange(63), 2**32], ValueError), (3, ValueError), ("perm", TypeError),
        ],
        "factors": [
            (ones(63), ValueError), (ones(64, 1), ValueError), (np.ones(64), TypeError),
            (with_value(ones(64), np.nan), ValueError), (with_value(ones(64), np.inf), ValueError),
            (np.arange(64), TypeError), (np.float32(1), ValueError),
        ],
        "rotation": [
            *((value, ValueError) for value in (1, 3, -2, 12, 2048, 2**70)),
            *((value, TypeError) for value in (True, 16.0, None, "16", [16], np.ones(1, int), np.bool_(False))),
        ],
    }),
    ("concat", lambda: {"weights": [pack(WEIGHT)]}, {
        "weights": [
            ([], ValueError), ([None], TypeError), ([pack(WEIGHT), CODES], TypeError),
            ([pack(WEIGHT), pack(Weight(33, 68, 32))], ValueError),
            ([pack(WEIGHT), pack(Weight(33, 64, 16))], ValueError),
            (None, TypeError), (pack(WEIGHT), TypeError), (3, TypeError),
        ],
    }),
    ("grouped_linear", good_grouped_linear, {
        "x": [*NO_FLOATS, *ROWS_THAT_DO_NOT_FIT, (ones(64), ValueError), (ones(1, ROWS, 64), ValueError)],
        "experts": BAD_EXPERTS,
        "rows_of_expert": [
            ([2, 0, 2], ValueError), ([0, 0, 2], ValueError), ([0, 0, 0], ValueError), ([4, -1, 0], ValueError),
            (np.array([4, -1, 0], np.int8), ValueError), ([2, 1], ValueError), ([2, 0, 1, 0], ValueError),
            ([[2, 0, 1]], ValueError), (3, ValueError), (np.array([2**64 - 1, 4, 0], np.uint64), ValueError),
            (np.array([2**63 - 1, 2**63 - 1, 5]), ValueError), (np.array([2.0, 0, 1]), TypeError),
            (np.array([1, 1, 1], bool), TypeError), (None, TypeError), ("rows", TypeError), (RAGGED, ValueError),
        ],
        "bias": bad_bias(EXPERTS, 33), "out_dtype": BAD_OUT_DTYPE, "out": BAD_OUT, "act": BAD_ACT,
    }),
    ("linear_gated", good_linear_gated, {
        "x": NO_FLOATS + ROWS_THAT_DO_NOT_FIT, "gate_up": [*BAD_PACKED, (pack(WEIGHT), ValueError)],
        "bias": [(ones(33), ValueError), (ones(66, 1), ValueError), (ones(66, dtype=np.float64), TypeError)],
        "out_dtype": BAD_OUT_DTYPE, "out": [*BAD_OUT, (ones(ROWS, 66), ValueError)], "act": BAD_ACT, **BAD_GATING,
    }),
    ("moe", good_moe, {
        "x": NO_FLOATS + ROWS_THAT_DO_NOT_FIT,
        "gate_up": [*BAD_EXPERTS, (pack_experts(WEIGHT, EXPERTS), ValueError)],
        "down": [
            *BAD_EXPERTS, (pack_experts(DOWN, EXPERTS + 1), ValueError), (pack_experts(WEIGHT, EXPERTS), ValueError),
            (pack_experts(GATE_UP, EXPERTS), ValueError),
        ],
        "topk_ids": [
            *bad_ids(EXPERTS, (ROWS, 2)), (IDS[1:], ValueError), (IDS[0], ValueError), (IDS[None], ValueError),
            (IDS[..., None], ValueError), (IDS.T, ValueError), (0, ValueError), (None, TypeError),
        ],
        "topk_weights": [*bad_bias(ROWS, 2), (ones(2, ROWS), ValueError), (1.0, TypeError), (None, TypeError)],
        "gate_up_bias": bad_bias(EXPERTS, 66), "down_bias": bad_bias(EXPERTS, 33),
        "routed_scaling": BAD_NUMBER, "out_dtype": BAD_OUT_DTYPE, "out": BAD_OUT, "act": BAD_ACT, **BAD_GATING,
    }),
    ("moe", good_expert_map, {
        "expert_map": [
            *bad_ids(EXPERTS, (10,)), (np.zeros((10, 1), np.int32), ValueError), (np.int32(1), ValueError),
        ],
        "topk_ids": bad_ids(10, (ROWS, 2)),
    }),
    ("use_kernel", lambda: {"name": "scalar"}, {
        "name": [(None, TypeError), (b"scalar", TypeError), (3, TypeError)],  # unknown names: test_runtime.py
    }),
    ("set_num_threads", lambda: {"threads": None}, {
        "threads": [
            (0, ValueError), (-1, ValueError), (65537, ValueError),
            (2.0, TypeError), ("2", TypeError), (True, TypeError),
        ],
    }),
]  # fmt: skip


def rows():
    for function, good, table in TABLE:
        for argument, values in table.items():
            for i, (value, error) in enumerate(values):
                yield pytest.param(function, good, argument, value, error, id=f"{function}-{argument}-{i}")


def call(function, arguments):
    result = getattr(pyda8w4, function)(**arguments)
    if function == "use_kernel":
        with result:
            pass


@pytest.mark.parametrize("function, good, argument, value, error", list(rows()))
def test_bad_argument(function, good, argument, value, error):
    arguments = {**good(), argument: value}
    out = np.full((ROWS, 33), CANARY, np.float32)
    if "out_dtype" in inspect.signature(getattr(pyda8w4, function)).parameters and not argument.startswith("out"):
        arguments["out"] = out
    with pytest.raises(error) as raised:
        call(function, arguments)
    assert type(raised.value) is error
    assert argument in str(raised.value)
    assert (out == CANARY).all()


@pytest.mark.parametrize("kind", [{"factors": True}, {"rotation": 64}, {"factors": True, "rotation": 2}], ids=str)
def test_gemm_refuses_factors_and_rotations_and_writes_nothing(kind):
    weight = pack(Weight(33, 64, 32, **kind))
    out = np.full((ROWS, 33), CANARY, np.float32)
    with pytest.raises(ValueError, match="packed must have no factors and no rotation"):
        pyda8w4.gemm(**{**good_gemm(), "packed": weight}, out=out)
    assert (out == CANARY).all()


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_codes_and_zero_points_of_more_bits_have_their_range(bits, signed):
    half = 1 << (bits - 1)
    low, high = (-half, half - 1) if signed else (0, 2 * half - 1)
    codes = np.zeros((33, 70), np.int8 if signed else np.uint8)
    for good in (low, high):
        packed = pyda8w4.prepack(with_value(codes, good), ones(33), bits=bits)
        assert packed.unpack()[0][-1, -1] == (good + half * signed if bits < 8 else good - 128 * (not signed))
    for bad in (low - 1, high + 1):
        if bits < 8 and np.iinfo(codes.dtype).min <= bad:
            for at in (0, 31 * 70 + 3, 33 * 70 - 1):
                wrong = codes.copy()
                wrong.flat[at] = bad
                with pytest.raises(
                    ValueError, match=f"codes must hold {low} to {high} as {codes.dtype} of {bits} bits"
                ):
                    pyda8w4.prepack(wrong, ones(33), bits=bits)
    if signed:
        least, most = (-128 - half, 127 - half) if bits < 8 else (-128, 127)
    else:
        least, most = (-128, 127) if bits < 8 else (0, 255)
    for good in (least, most):
        pyda8w4.prepack(codes, ones(33), np.full(33, good), bits=bits)
    for bad in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"zps must be {least} to {most} for {codes.dtype} codes"):
            pyda8w4.prepack(codes, ones(33), np.full(33, bad), bits=bits)
    assert pyda8w4.prepack(codes, ones(33), bits=bits).zero_point == (0 if bits == 8 else half)


@pytest.mark.parametrize("bits, longest", [(4, 2**20), (5, 2**19), (6, 2**18), (8, 2**17)])
def test_groups_whose_sums_could_leave_int32(bits, longest):
    """127 * 128 * 2**17 and -128 * -128 * 2**17 are just beyond; of fewer bits with a zero point in the middle."""
    k = longest - 4 if bits == 8 else longest
    codes, scales = np.zeros((1, k), np.uint8), ones(1)
    pyda8w4.prepack(codes, scales, bits=bits)
    with pytest.raises(ValueError, match=r"group_size.*max\|codes - zps\|"):
        pyda8w4.prepack(np.zeros((1, 2 * longest), np.uint8), scales, bits=bits)


@pytest.mark.parametrize("function, good", [(function, good) for function, good, _ in TABLE])
def test_the_good_arguments_are_good(function, good):
    call(function, good())


PRODUCTS = [(function, good) for function, good, table in TABLE if "out" in table]


@pytest.mark.parametrize("out", BAD_OUT[:-2], ids=lambda case: "")
def test_a_refused_out_is_not_written(out):
    array = out[0]
    if not isinstance(array, np.ndarray):
        return
    before = array.copy()
    for function, good in PRODUCTS:
        with pytest.raises(out[1], match="out"):
            call(function, {**good(), "out": array})
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("type_of_out", [np.float16, ml_dtypes.bfloat16])
def test_out_and_out_dtype_must_agree(type_of_out):
    out = np.full((ROWS, 33), 7, type_of_out)
    with pytest.raises(TypeError, match="out"):
        pyda8w4.linear(**good_linear(), out=out, out_dtype=np.float32)
    assert (out == 7).all()
    pyda8w4.linear(**good_linear(), out=out, out_dtype=type_of_out)


def test_int8_zero_points_have_the_range_of_int8():
    a, a_scales, a_zps = (array[:ROWS] for array in quantized(64, "int8"))
    for bad in (-129, 128, 255):
        with pytest.raises(ValueError, match="a_zps must be -128 to 127"):
            pyda8w4.gemm(a, pack(WEIGHT), a_scales, with_value(a_zps, bad))
    for good in (-128, 127):
        pyda8w4.gemm(a, pack(WEIGHT), a_scales, with_value(a_zps, good))


@pytest.mark.parametrize("row", [0, 1, 239, 240, 241, 255, 256, 480, 998, 999])
def test_the_zero_point_of_every_row_is_checked(row):
    out = np.full((1000, 33), CANARY, np.float32)
    for dtype, bad in ((np.uint8, 256), (np.uint8, -1), (np.int8, 128), (np.int8, -129)):
        zps = np.zeros(1000, np.int32)
        zps[row] = bad
        with pytest.raises(ValueError, match="a_zps"):
            pyda8w4.gemm(np.zeros((1000, 64), dtype), pack(WEIGHT), None, zps, out=out)
    assert (out == CANARY).all()


def test_signed_codes_take_lower_zero_points():
    scales = ones(33, 2)

    def prepack(*zps):
        return pyda8w4.prepack(SIGNED, scales, np.resize(np.array(zps, np.int16), (33, 2)))

    for zps in ((-136,), (119,), (-128, 119)):
        prepack(*zps)
    for zps in ((-137,), (120,), (-137, 0), (0, 120), (-136, -135)):
        with pytest.raises(ValueError, match="zps must be"):
            prepack(*zps)


def test_messages_say_what_was_given_and_what_is_taken():
    with pytest.raises(TypeError, match=r"x must be an array of float32, float16 or bfloat16, got float64"):
        pyda8w4.linear(ones(1, 64, dtype=np.float64), pack(WEIGHT))
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 64\) .* got \(1, 65\)"):
        pyda8w4.linear(ones(1, 65), pack(WEIGHT))
    with pytest.raises(ValueError, match=r"bias must have shape \(33,\), got \(32,\)"):
        pyda8w4.linear(ones(1, 64), pack(WEIGHT), ones(32))
    with pytest.raises(ValueError, match=r"a_zps must be 0 to 255 for uint8 activations, got .* to 256"):
        pyda8w4.gemm(A, pack(WEIGHT), None, with_value(ZPS, 256))
    with pytest.raises(ValueError, match=r"codes must hold 0 to 15 as uint8 of 4 bits, got 0 to 16"):
        pyda8w4.prepack(with_value(CODES, 16), SCALES)
    with pytest.raises(ValueError, match=r"topk_ids must hold -1 to 2, got 7"):
        pyda8w4.moe(**{**good_moe(), "topk_ids": np.array([[0, 1], [7, -1], [1, 1]], np.int32)})
    with pytest.raises(ValueError, match=r"topk_ids must hold -1 to 9, got -3"):
        pyda8w4.moe(**{**good_expert_map(), "topk_ids": np.array([[0, 1], [-3, -1], [1, 1]], np.int32)})
    slots = np.zeros((1, 1 << 23), np.int32)
    with pytest.raises(ValueError, match=r"topk_ids must have at most 8388607 slots, got 8388608"):
        pyda8w4.moe(**{**good_moe(), "x": ones(1, 64), "topk_ids": slots, "topk_weights": slots.view(np.float32)})
    with pytest.raises(ValueError, match=r"expert_map must hold -1 to 2, got 3"):
        pyda8w4.moe(**{**good_moe(), "expert_map": np.arange(4)})
    with pytest.raises(ValueError, match=r"topk_ids must have shape \(3, T\), got \(2, 2\)"):
        pyda8w4.moe(**{**good_moe(), "topk_ids": IDS[1:]})
    with pytest.raises(ValueError, match=r"down must have shape \(3, N, 33\) for gate_up of shape \(3, 66, 64\), got"):
        pyda8w4.moe(**{**good_moe(), "down": pack_experts(WEIGHT, EXPERTS)})
    with pytest.raises(ValueError, match=r"rows_of_expert must add up to the 3 rows of x, got 4"):
        pyda8w4.grouped_linear(**{**good_grouped_linear(), "rows_of_expert": [2, 0, 2]})
    with pytest.raises(ValueError, match=r"rows_of_expert must hold numbers of rows, got -1"):
        pyda8w4.grouped_linear(**{**good_grouped_linear(), "rows_of_expert": [2, 2, -1]})
    with pytest.raises(TypeError, match=r"got >f4|got <f4"):
        pyda8w4.linear(swapped(ones(1, 64)), pack(WEIGHT))


@pytest.mark.parametrize(
    "number, found", [(0.0, "float, which numpy makes float64"), (True, "bool, which numpy makes bool")]
)
def test_numbers_are_called_numbers(number, found):
    with pytest.raises(TypeError, match=f"^bias must be an array of float32, got {found}"):
        pyda8w4.linear(ones(1, 64), pack(WEIGHT), bias=number)


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError, BufferError])
def test_what_cannot_become_an_array_is_named(error):
    class Holder:
        def __array__(self, dtype=None, copy=None):
            raise error("of another library")

    with pytest.raises(TypeError, match=r"^x must be an array, got Holder: .*of another library"):
        pyda8w4.linear(Holder(), pack(WEIGHT))
    with pytest.raises(TypeError, match=r"^w must be an array, got Holder: .*of another library"):
        pyda8w4.quantize_weight(Holder())


def test_concat_of_several_arguments_says_how_it_is_called():
    with pytest.raises(TypeError, match=r"^weights must be one sequence, as in concat\(\[a, b\]\), got 3 arguments"):
        pyda8w4.concat(pack(WEIGHT), pack(WEIGHT), pack(WEIGHT))


def test_inputs_that_are_not_arrays_but_arrays_can_be_made_of():
    class Holder:
        def __array__(self, dtype=None, copy=None):
            return floats(64)[:ROWS]

    assert_same_bits(pyda8w4.linear(Holder(), pack(WEIGHT)), pyda8w4.linear(floats(64)[:ROWS], pack(WEIGHT)))


def test_nibbles_are_of_4_bits():
    with pytest.raises(ValueError, match="nibbles must be None for codes of 8 bits"):
        pyda8w4.prepack(CODES, SCALES, bits=8, nibbles="low_first")


def test_nibbles_take_bytes_only():
    with pytest.raises(TypeError, match="codes"):
        pyda8w4.prepack(SIGNED, ones(33), nibbles="low_first")


@pytest.mark.parametrize("weights", [None, [], [pack(WEIGHT)], {"w": CODES}, {1: pack(WEIGHT)}, {"w": None}])
def test_save_names_its_argument(tmp_path, weights):
    with pytest.raises(TypeError, match="weights"):
        pyda8w4.save(tmp_path / "file", weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["save", "load"])
def test_paths_that_are_none(function):
    arguments = ({},) if function == "save" else ()
    for path in (None, 3):
        with pytest.raises(TypeError):
            getattr(pyda8w4, function)(path, *arguments)


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        pyda8w4.load(tmp_path / "missing")
