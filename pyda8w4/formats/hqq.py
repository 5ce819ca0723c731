"""HQQ: half-quadratic quantization, as hqq and transformers save it in safetensors files.

The layout is that of ``hqq/core/bitpack.py`` and ``hqq/core/quantize.py``: the matrix is cut into groups, which
become the rows (axis 1) or the columns (axis 0) of another matrix, whose rows are packed: a word holds codes of rows
that are far from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, ceil_div, one_of
from pyda8w4._format import Format
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._bits import stored_bits
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import (
    FLOAT_TYPES,
    Parts,
    Shaped,
    arrays_of,
    check_count,
    check_matrix,
    head,
    modules,
    named,
    read_arrays,
    scale_dtype,
)
from pyda8w4.formats._zeros import without_zeros

__all__ = ["dequantize", "unpack"]


class _Packing(NamedTuple):
    name: str
    words: str  # the type of a word
    bits: int  # of a code in it
    per_word: int  # the first one in the highest bits

    def codes(self, words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """-> (per_word * rows, columns)."""
        found = np.empty((self.per_word, *words.shape), np.uint8)
        mask = (1 << self.bits) - 1
        for i, codes in enumerate(found):
            shift = self.bits * (self.per_word - 1 - i)
            np.copyto(codes, words >> shift & mask, casting="unsafe")
        return found.reshape(-1, words.shape[1])


_BYTES = _Packing("8bit_u8", "uint8", 8, 1)
_PACKINGS: dict[float, _Packing] = {
    8: _BYTES,
    6: _BYTES,
    5: _BYTES,
    4: _Packing("4bit_u8", "uint8", 4, 2),
    3: _Packing("3bit_32", "int32", 3, 10),
    2: _Packing("2bit_u8", "uint8", 2, 4),
    1.58: _Packing("2bit_u8", "uint8", 2, 4),
    1: _Packing("1bit_u8", "uint8", 1, 8),
}


def unpack(
    w_q: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero: npt.ArrayLike,
    *,
    shape: tuple[int, int],
    nbits: float = 4,
) -> QuantizedWeight:
    """Take a weight with groups along axis 1.

    Parameters
    ----------
    w_q : (R, group_size) ndarray of uint8 (int32 for 3 bits)
        ``W_q``: codes of N * K / group_size groups. With ``view_as_float``, the same memory as floats.
    scale, zero : ndarray of float16, bfloat16 or float32
        Of each group: as many as groups.
    shape : tuple of two ints
        (N, K).
    nbits : {8, 6, 5, 4, 3, 2, 1.58, 1}
        Bits of a code.

    Returns
    -------
    QuantizedWeight
        Exactly these weights, of 4, 5, 6 or 8 bits: with zero points where `zero` has integers, else with offsets.

    Raises
    ------
    TypeError
        If an array has the wrong type.
    ValueError
        If shapes do not fit each other, a group is in two rows, or `zero` has fractions and a product
        ``zero * scale`` is not exact in float32, as can happen to float32.

    Notes
    -----
    ``w = (code - zero) * scale``. hqq rounds difference and product to the type that it computes with. Here
    ``code * scale - zero * scale`` is rounded once, to float32: for scales of float16 and bfloat16 both products are
    exact. For scales of float32 with offsets, the first product is rounded, too.

    Examples
    --------
    >>> import numpy as np
    >>> from pyda8w4.formats import hqq
    >>> w_q = np.array([[0x04, 0x15, 0x26, 0x3F]], np.uint8)  # two rows: 0, 1, 2, 3 and 4, 5, 6, 15
    >>> scale, zero = np.array([[0.5], [1]], np.float16), np.array([[1.5], [4.25]], np.float16)
    >>> hqq.unpack(w_q, scale, zero, shape=(2, 4)).pack().dequantize()
    array([[-0.75, -0.25,  0.25,  0.75],
           [-0.25,  0.75,  1.75, 10.75]], dtype=float32)
    """
    arrays = _arrays(w_q, scale, zero, nbits)
    layout = _layout(named(arrays), shape, nbits, 1)
    layout.check_groups()
    scales, zeros = (arrays[name].reshape(layout.n, -1) for name in ("scale", "zero"))
    bits = stored_bits(int(nbits))
    return QuantizedWeight(
        layout.codes(arrays["w_q"]).reshape(layout.n, layout.k),
        scales,
        bits=bits,
        group_size=layout.columns,
        **without_zeros(zeros, scales, *_zero_points(bits)),
    )


def dequantize(
    w_q: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero: npt.ArrayLike,
    *,
    shape: tuple[int, int],
    nbits: float = 4,
    axis: int = 1,
) -> npt.NDArray[np.float32]:
    """Take a weight with groups along either axis, as floats.

    Parameters
    ----------
    w_q : (R, C) ndarray of uint8 (int32 for 3 bits)
        As for `unpack`; for axis 0, C groups, and group_size rows that are packed.
    scale, zero : ndarray of float16, bfloat16 or float32
        Of each group: as many as groups.
    shape : tuple of two ints
        (N, K).
    nbits : {8, 6, 5, 4, 3, 2, 1.58, 1}
        Bits of a code.
    axis : {1, 0}
        Along which groups are.

    Returns
    -------
    (N, K) ndarray of float32
        ``(code - zero) * scale``, rounded once.

    Raises
    ------
    TypeError, ValueError
        As `unpack`, but for groups in two rows and products.
    """
    arrays = _arrays(w_q, scale, zero, nbits)
    layout = _layout(named(arrays), shape, nbits, axis)
    of_groups = (-1, 1) if axis == 1 else (1, -1)
    codes = layout.codes(arrays["w_q"])
    found = np.empty(codes.shape, np.float32)
    step = ceil_div(1 << 20, layout.columns)  # rows that take a few megabytes as float64
    with np.errstate(over="ignore", invalid="ignore"):
        scales, zeros = (arrays[name].reshape(of_groups).astype(np.float64) for name in ("scale", "zero"))
        for begin in range(0, layout.rows, step):
            rows = slice(begin, begin + step)
            of_rows = rows if axis == 1 else slice(None)
            found[rows] = (codes[rows] - zeros[of_rows]) * scales[of_rows]
    return found.reshape(layout.n, layout.k)


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers of a checkpoint.

    Parameters
    ----------
    config : mapping
        ``quantization_config`` of config.json. Nothing of it is needed: every layer has its own in tensors.
    tensors : mapping of str to Tensor
        All of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the paths of modules.
    """
    return {module: _layer(Parts(tensors, f"{module}.", _NAMES)) for module in modules(tensors, ".W_q")}


# ---- shapes ----------------------------------------------------------------------------------


class _Layout(NamedTuple):
    n: int
    k: int
    packing: _Packing
    rows: int
    columns: int

    def codes(self, words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """-> (rows, columns), without padding."""
        return self.packing.codes(words)[: self.rows]

    def check_groups(self) -> None:
        """ValueError unless the groups of axis 1 are those of a packed weight."""
        if self.k % self.columns or (self.columns % 4 and self.columns != self.k):
            raise ValueError(
                f"groups must be of a multiple of 4 inputs, or all, and divide the {self.k} inputs, got {self.columns}"
            )


def _layout(parts: Mapping[str, Shaped], shape: Sequence[int], nbits: float, axis: int) -> _Layout:
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis!r}")
    if len(shape) != 2 or not all(isinstance(size, int) and 0 < size < 1 << 40 for size in shape):
        raise ValueError(f"shape must be two positive ints, got {shape!r}")
    packing = _packing(nbits)
    (n, k), w_q = shape, parts["w_q"]
    words, columns = w_q.shape
    rows = n * k // max(columns, 1)
    padding = words * packing.per_word - rows
    most = packing.per_word if packing.per_word == 10 else 1  # only rows of codes of 3 bits are padded
    if rows * columns != n * k or not 0 <= padding < most:
        raise ValueError(f"{w_q.name} must have the codes of {n} x {k} weights, got shape {w_q.shape}")
    groups = rows if axis == 1 else columns
    for name in ("scale", "zero"):
        check_count(parts[name], groups)
    return _Layout(n, k, packing, rows, columns)


def _packing(nbits: float) -> _Packing:
    if not isinstance(nbits, (int, float)) or nbits not in _PACKINGS:
        raise ValueError(f"nbits must be {one_of(tuple(_PACKINGS))}, got {nbits!r}")
    return _PACKINGS[nbits]


def _zero_points(bits: int) -> tuple[int, int]:
    """What prepack takes for codes without a sign."""
    return (0, 255) if bits == 8 else (-128, 127)


def _word_shape(w_q: Shaped, packing: _Packing) -> tuple[int, int]:
    """The shape of words that may be disguised as other types."""
    rows, columns = check_matrix(w_q)
    size = np.dtype(packing.words).itemsize
    if columns * w_q.itemsize % size:
        raise ValueError(f"{w_q.name} must have rows of {packing.words}, got shape {w_q.shape} of {w_q.itemsize} bytes")
    return rows, columns * w_q.itemsize // size


def _arrays(w_q: npt.ArrayLike, scale: npt.ArrayLike, zero: npt.ArrayLike, nbits: float) -> dict[str, npt.NDArray[Any]]:
    packing = _packing(nbits)
    arrays = arrays_of((packing.words, *FLOATS), w_q=w_q)
    shape = _word_shape(named(arrays)["w_q"], packing)
    words = np.frombuffer(arrays["w_q"].tobytes(), packing.words).reshape(shape)
    return {"w_q": words, **arrays_of(FLOATS, scale=scale, zero=zero)}


# ---- checkpoints -----------------------------------------------------------------------------

# What HQQLinear.state_dict saves but for the bias, and what offload_meta makes of scale and zero.
_NAMES = (
    "W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero", "zero_scale",
)  # fmt: skip


def _layer(parts: Parts) -> Layer:
    packed = parts.take("W_q")
    type_, shape = "HQQ", packed.shape
    floats = None
    try:
        nbits = round(_number(parts, "nbits", "I32", "F32"), 2)
        packing = _packing(nbits)
        type_ = f"HQQ {nbits:g}-bit"
        for name in ("quant_scale", "quant_zero"):
            if parts.find(name) is not None and _number(parts, name, "U8") != 0:
                raise ValueError(f"{name} must be 0: scales and zero points that are quantized are not read")
        if (said := _string(parts, "packing")) != packing.name:
            raise ValueError(f"packing must be {packing.name} for {nbits:g} bits, got {said!r}")
        scale, zero = parts.take("scale", *FLOAT_TYPES), parts.take("zero", *FLOAT_TYPES)
        disguises = FLOAT_TYPES if _number(parts, "view_as_float", "U8") else ()
        stored = {"uint8": "U8", "int32": "I32"}[packing.words]
        parts.take("W_q", stored, *disguises)
        words = packed._replace(dtype=stored, shape=_word_shape(packed, packing))
        tensors = {"w_q": words, "scale": scale, "zero": zero}
        n, k = _numbers(parts, "shape", 2, "I64")
        axis = _number(parts, "axis", "I32")
        layout = _layout(tensors, (n, k), nbits, axis)
        shape = n, k

        def floats(index: int) -> npt.NDArray[np.float32]:
            return dequantize(**read_arrays(tensors), shape=(n, k), nbits=nbits, axis=axis)

        if axis == 0:
            raise ValueError("axis must be 1, got 0: the groups of axis 0 are not of consecutive inputs")
        layout.check_groups()
        format = _format(layout, nbits, scale, zero)
    except ValueError as error:
        return parts.layer(type_, shape, floats=floats, refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return unpack(**read_arrays(tensors), shape=(n, k), nbits=nbits)

    return parts.layer(type_, shape, read=read, format=format)


def _format(layout: _Layout, nbits: float, scale: Tensor, zero: Tensor) -> Format:
    """As far as headers tell, and some numbers: of float32, all. ValueError if these cannot be held exactly."""
    some = (lambda tensor: tensor) if "F32" in (scale.dtype, zero.dtype) else head
    bits = stored_bits(int(nbits))
    scales, zeros = some(scale).floats(), some(zero).floats()
    found = without_zeros(zeros.reshape(-1), scales.reshape(-1), *_zero_points(bits))
    sizes = layout.n, layout.k, layout.columns
    if "offsets" in found:  # which are products and need float32
        return Format(*sizes, "float32", zero_point=0, has_offsets=True, bits=bits)
    alike = (found["zps"] == found["zps"][0]).all()
    return Format(*sizes, scale_dtype(scale), zero_point=0 if alike else None, bits=bits)


def _numbers(parts: Parts, name: str, count: int, *dtypes: str) -> list[Any]:
    tensor = parts.take(name, *dtypes)
    check_count(tensor, count)
    found: list[Any] = tensor.array().reshape(-1).tolist()
    return found


def _number(parts: Parts, name: str, *dtypes: str) -> Any:
    return _numbers(parts, name, 1, *dtypes)[0]


def _string(parts: Parts, name: str) -> str:
    """Of bytes, one for each character."""
    return head(parts.take(name, "U8")).array().tobytes().decode("latin-1")
