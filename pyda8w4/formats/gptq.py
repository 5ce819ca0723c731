"""GPTQ: what AutoGPTQ and GPTQModel write.

>>> import numpy as np
>>> from pyda8w4.formats import gptq
>>> qweight = np.full((4, 8), 0x76543210, np.int32)  # codes 0 to 7, four times, for each of 8 columns
>>> qzeros, scales = np.full((1, 1), 0x77777777, np.int32), np.full((1, 8), 0.5, np.float16)
>>> gptq.unpack(qweight, qzeros, scales, group_size=32, sym=True).pack().dequantize()[0, :8]
array([-4. , -3.5, -3. , -2.5, -2. , -1.5, -1. , -0.5], dtype=float32)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, ceil_div, check_flag, check_scheme
from pyda8w4._format import Format, check_group_size, group_count
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import _config
from pyda8w4.formats._bits import check_bits, fields, stored_bits
from pyda8w4.formats._layer import Layer
from pyda8w4.formats._parts import (
    FLOAT_TYPES,
    WORD_TYPES,
    WORDS,
    Parts,
    Shaped,
    arrays_of,
    check_matrix,
    check_shape,
    modules,
    named,
    read_arrays,
    scale_dtype,
)

__all__ = ["unpack"]

_BITS = (2, 4, 8)
# Those of 4 bits are the same in gptq_p: its planes have one field of each word.
_FORMATS = ("gptq", "gptq_v2", "gptq_p")
_COLUMNS = 64  # that are unpacked at once, so that they stay in caches


def unpack(
    qweight: npt.ArrayLike,
    qzeros: npt.ArrayLike | None,
    scales: npt.ArrayLike,
    g_idx: npt.ArrayLike | None = None,
    *,
    bits: int = 4,
    group_size: int,
    sym: bool,
    checkpoint_format: str = "gptq",
) -> QuantizedWeight:
    """Take the tensors of a layer.

    Parameters
    ----------
    qweight : (K * bits / B, N) ndarray of integers
        Words of B bits, 32 as a rule. The lowest field of a word is the first k.
    qzeros : (G, N * bits / B) ndarray of integers, or None
        Words of zero points: the lowest field is the first column. May be None if `sym`.
    scales : (G, N) ndarray of float32, float16 or bfloat16
        One for each group and column.
    g_idx : (K,) ndarray of integers, optional
        The group of each k. None means ``k // group_size``.
    bits : {2, 4, 8}
        Of a code.
    group_size : int
        How many k are in a group; -1 means all.
    sym : bool
        Whether all zero points are half the range. Files with such zero points say which way they are stored,
        and some say the wrong one: 7 and 8 both mean 8.
    checkpoint_format : {'gptq', 'gptq_v2', 'gptq_p'}
        Zero points are stored less one in 'gptq', as they are in the others.

    Returns
    -------
    QuantizedWeight
        ``w[n, k] = scales[g, n] * (codes[k, n] - zeros[g, n])`` with ``g = g_idx[k]``; codes of 2 bits become
        codes of 4.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit each other, a group has more or less than `group_size` of the k (only the last group
        may), or zero points contradict `sym`.

    Warns
    -----
    UserWarning
        If a zero point is stored as the greatest value of 'gptq'. AutoGPTQ writes that for a zero point of 0, which
        also damages those beside it in the word. It is taken as AutoGPTQ's kernels do, as the value plus one.

    Notes
    -----
    AutoGPTQ's qlinear_cuda_old.py has the definition, and GPTQModel's planar_packing.py that of 'gptq_p'.

    With act-order, `g_idx` is in any order. Columns are then sorted by their group, and the weight has a
    permutation.
    """
    scheme = Scheme(bits, group_size, check_flag("sym", sym), checkpoint_format)
    _check_kind(scheme)
    if qzeros is None and not sym:
        raise ValueError("qzeros must be given where zero points are not symmetric, got None")
    arrays = arrays_of(WORDS, qweight=qweight, qzeros=qzeros, g_idx=g_idx) | arrays_of(FLOATS, scales=scales)
    return _unpack(arrays, named(arrays), scheme)


def layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Find the layers of a checkpoint.

    Parameters
    ----------
    config : dict
        What config.json has as quantization_config, or quantize_config.json.
    tensors : dict of str to Tensor
        All of the checkpoint.

    Returns
    -------
    dict of str to Layer
        By the path of the module.

    Raises
    ------
    ValueError
        If the config makes no sense: names the key.
    """
    scheme_of(config)
    configs = _config.by_module(config, modules(tensors, ".qweight"))
    return {name: layer(name, tensors, scheme_of(of_module, refusal)) for name, of_module, refusal in configs}


class Scheme(NamedTuple):
    """How a layer is quantized."""

    bits: int
    group_size: int
    sym: bool
    checkpoint_format: str
    act_order: bool = False  # as far as a config tells
    refusal: str | None = None


def scheme_of(config: Mapping[str, Any], refusal: str | None = None) -> Scheme:
    """What a config says."""
    if config.get("rotation"):
        # GPTQModel's loader.py multiplies the inputs of some layers by a Hadamard matrix then.
        refusal = "rotation changes its inputs"
    return Scheme(
        bits=_config.integer(config, "bits"),
        group_size=_config.integer(config, "group_size"),
        sym=_config.flag(config, "sym", default=True),
        checkpoint_format=_config.word(config, "checkpoint_format", "format", default="gptq"),
        act_order=_config.flag(config, "desc_act", default=False)
        and not _config.flag(config, "static_groups", default=False),
        refusal=refusal,
    )


def layer(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, method: str = "GPTQ") -> Layer:
    """Describe a layer that has the tensors of GPTQ."""
    parts = Parts(tensors, f"{name}.", ("qweight", "qzeros", "scales", "g_idx"))
    type_ = f"{method} {scheme.bits}-bit"
    try:
        if scheme.refusal is not None:
            raise ValueError(scheme.refusal)
        _check_kind(scheme)
        words = [part for part in ("qzeros", "g_idx") if part in parts or (part == "qzeros" and not scheme.sym)]
        found = parts.take_all({"qweight": WORD_TYPES, "scales": FLOAT_TYPES, **dict.fromkeys(words, WORD_TYPES)})
        sizes = _sizes(found, scheme)
        if scheme.act_order and "g_idx" not in found and sizes.groups > 1:
            raise ValueError(f"{name}.g_idx is missing, which desc_act needs")
        zero_point = 0 if scheme.bits == 8 else 1 << (scheme.bits - 1)
        format = Format(
            sizes.n,
            sizes.k,
            sizes.group,
            scale_dtype(found["scales"]),
            zero_point if scheme.sym else None,
            bits=stored_bits(scheme.bits),
            has_perm=scheme.act_order and sizes.groups > 1,
        )
    except ValueError as error:
        return parts.layer(type_, _shape(parts.take("qweight").shape, scheme.bits), refusal=str(error))

    def read(index: int) -> QuantizedWeight:
        return _unpack(read_arrays(found), found, scheme)

    return parts.layer(type_, (sizes.n, sizes.k), read=read, format=format)


def _shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """What a layer that cannot be read seems to be."""
    return (shape[1], shape[0] * 32 // bits) if len(shape) == 2 and bits > 0 else shape


def _check_kind(scheme: Scheme) -> None:
    check_bits("bits", scheme.bits, _BITS)
    check_scheme("checkpoint_format", scheme.checkpoint_format, _FORMATS)


class _Sizes(NamedTuple):
    n: int
    k: int
    group: int  # elements of k in a group
    groups: int


def _sizes(parts: Mapping[str, Shaped], scheme: Scheme) -> _Sizes:
    """Check all shapes. K is what `g_idx` says: the last words may be padded."""
    qweight, bits = parts["qweight"], scheme.bits
    rows, n = check_matrix(qweight)
    k = rows * 8 * qweight.itemsize // bits
    if "g_idx" in parts:
        shape = parts["g_idx"].shape
        if len(shape) != 1 or ceil_div(shape[0] * bits, 8 * qweight.itemsize) != rows:
            raise ValueError(f"{parts['g_idx'].name} must have shape ({k},) for {rows} rows of words, got {shape}")
        k = shape[0]
    group = check_group_size(k if scheme.group_size == -1 else scheme.group_size, k)
    groups = group_count(k, group)
    why = f" for K = {k}, N = {n} and group_size {scheme.group_size}"
    check_shape(parts["scales"], (groups, n), why)
    if "qzeros" in parts:
        check_shape(parts["qzeros"], (groups, ceil_div(n * bits, 8 * parts["qzeros"].itemsize)), why)
    return _Sizes(n, k, group, groups)


def _unpack(arrays: Mapping[str, npt.NDArray[Any]], parts: Mapping[str, Shaped], scheme: Scheme) -> QuantizedWeight:
    """`parts` has the names of the arrays, for messages."""
    sizes, bits = _sizes(parts, scheme), scheme.bits
    zps: npt.NDArray[np.int16] = np.full((sizes.groups, sizes.n), 1 << (bits - 1), np.int16)
    if "qzeros" in arrays:
        zps = _zero_points(fields(arrays["qzeros"], bits, axis=1)[:, : sizes.n], parts["qzeros"].name, scheme)
    perm = _permutation(arrays["g_idx"], parts["g_idx"].name, sizes) if "g_idx" in arrays else None
    codes = np.empty((sizes.n, sizes.k), np.uint8)
    for begin in range(0, sizes.n, _COLUMNS):
        columns = slice(begin, begin + _COLUMNS)
        # Words are transposed before they become codes, which are more.
        found = fields(arrays["qweight"][:, columns].T, bits, axis=1)[:, : sizes.k]
        codes[columns] = found if perm is None else found.take(perm, axis=1)
    return QuantizedWeight(codes, arrays["scales"].T, zps.T, bits=stored_bits(bits), perm=perm, group_size=sizes.group)


def _zero_points(stored: npt.NDArray[np.uint8], name: str, scheme: Scheme) -> npt.NDArray[np.int16]:
    middle, most = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    zps = stored.astype(np.int16)
    if scheme.sym:
        least, greatest = zps.min(), zps.max()
        if least != greatest or least not in (middle - 1, middle):
            raise ValueError(
                f"{name} must hold {middle - 1} or {middle} everywhere where sym is true, got {least} to {greatest}"
            )
        return np.full_like(zps, middle)
    if scheme.checkpoint_format != "gptq":
        return zps
    if (zps == most).any():
        warnings.warn(
            f"{name} holds {most}, which stands for a zero point of {most + 1}, or is what AutoGPTQ makes of 0, which "
            "damages those beside it",
            stacklevel=4,
        )
    return zps + np.int16(1)


def _permutation(g_idx: npt.NDArray[Any], name: str, sizes: _Sizes) -> npt.NDArray[np.intp] | None:
    """-> the order in which the columns are in groups one after the other, None where they already are."""
    wanted = np.arange(sizes.k) // sizes.group
    if np.array_equal(g_idx, wanted):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], wanted):
        raise ValueError(
            f"{name} must have {sizes.group} of each of 0 to {sizes.groups - 1}, and only of the last what is left, "
            f"got {g_idx.min()} to {g_idx.max()}"
        )
    return order
