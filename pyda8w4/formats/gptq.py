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
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import FLOATS, as_array_of, ceil_div, check_flag, check_scheme
from pyda8w4._safetensors import Tensor
from pyda8w4.formats import _config, _words
from pyda8w4.formats._bits import fields
from pyda8w4.formats._layer import Layer, predicted_format
from pyda8w4.formats._weight import QuantizedWeight
from pyda8w4.formats._words import Words

__all__ = ["unpack"]

_BITS = (2, 4, 8)
# Those of 4 bits are the same in gptq_p: its planes have one field of each word.
_FORMATS = ("gptq", "gptq_v2", "gptq_p")
_COLUMNS = 64  # that are unpacked at once, so that they stay in caches
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


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
    name: str = "",
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
    name : str
        The path of the module, for messages.

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
    sym = check_flag("sym", sym)
    _check_kind(bits, checkpoint_format)
    words = _words.as_words(_words.joined(name, "qweight"), qweight)
    zeros = None if qzeros is None else _words.as_words(_words.joined(name, "qzeros"), qzeros)
    floats, _ = as_array_of(_words.joined(name, "scales"), scales, FLOATS)
    groups = None if g_idx is None else _words.as_words(_words.joined(name, "g_idx"), g_idx)
    sizes = _sizes(
        name,
        Words.of(words),
        None if zeros is None else Words.of(zeros),
        floats.shape,
        None if groups is None else groups.shape,
        bits,
        group_size,
    )
    zps = _zero_points(name, zeros, sizes, bits, sym, checkpoint_format)
    perm = None if groups is None else _permutation(name, groups, sizes)
    codes = np.empty((sizes.n, sizes.k), np.uint8)
    for begin in range(0, sizes.n, _COLUMNS):
        columns = slice(begin, begin + _COLUMNS)
        # Words are transposed before they become codes, which are more.
        found = fields(words[:, columns].T, bits, axis=1)[:, : sizes.k]
        codes[columns] = found if perm is None else found.take(perm, axis=1)
    return QuantizedWeight(
        codes,
        floats.T,
        zps.T,
        bits=max(bits, 4),
        perm=perm,
        group_size=sizes.group,
    )


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
    dynamic = _config.dynamic(config)
    found = {}
    for name in _words.modules(tensors):
        of_module, refusal = _config.of_module(name, config, dynamic)
        found[name] = layer(name, tensors, scheme_of(of_module, refusal))
    return found


class Scheme(NamedTuple):
    """How a layer is quantized."""

    bits: int
    group_size: int
    sym: bool
    act_order: bool  # as far as a config tells
    checkpoint_format: str
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
        act_order=_config.flag(config, "desc_act", default=False)
        and not _config.flag(config, "static_groups", default=False),
        checkpoint_format=_config.word(config, "checkpoint_format", "format", default="gptq"),
        refusal=refusal,
    )


def layer(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, method: str = "GPTQ") -> Layer:
    """Describe a layer that has the tensors of GPTQ."""
    found = _words.parts(name, tensors, _PARTS)
    about = _words.described(f"{method} {scheme.bits}-bit", found)
    try:
        if scheme.refusal is not None:
            raise ValueError(scheme.refusal)
        _check_kind(scheme.bits, scheme.checkpoint_format)
        if "qzeros" not in found and not scheme.sym:
            raise ValueError(f"{name}.qzeros is missing")
        sizes = _sizes(
            name,
            Words.in_file(found["qweight"]),
            Words.in_file(found["qzeros"]) if "qzeros" in found else None,
            _words.floats_in_file(name, found, "scales"),
            Words.in_file(found["g_idx"]).shape if "g_idx" in found else None,
            scheme.bits,
            scheme.group_size,
        )
        zero_point = 0 if scheme.bits == 8 else 1 << (scheme.bits - 1)
        format = predicted_format(
            sizes.n,
            sizes.k,
            sizes.group,
            zero_point if scheme.sym else None,
            bits=max(scheme.bits, 4),
            has_perm=scheme.act_order and "g_idx" in found and sizes.groups > 1,
        )
    except ValueError as error:
        return Layer(**about, shape=_shape(found["qweight"].shape, scheme.bits), refusal=str(error))
    return Layer(**about, shape=(sizes.n, sizes.k), read=partial(_read, name, found, scheme), format=format)


def _read(name: str, found: Mapping[str, Tensor], scheme: Scheme, index: int) -> QuantizedWeight:
    return unpack(
        found["qweight"].array(),
        found["qzeros"].array() if "qzeros" in found else None,
        found["scales"].floats(),
        found["g_idx"].array() if "g_idx" in found else None,
        bits=scheme.bits,
        group_size=scheme.group_size,
        sym=scheme.sym,
        checkpoint_format=scheme.checkpoint_format,
        name=name,
    )


def _shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """What a layer that cannot be read seems to be."""
    return (shape[1], shape[0] * 32 // bits) if len(shape) == 2 and bits > 0 else shape


def _check_kind(bits: int, checkpoint_format: str) -> None:
    _words.check_bits(bits, _BITS)
    check_scheme("checkpoint_format", checkpoint_format, _FORMATS)


class _Sizes(NamedTuple):
    n: int
    k: int
    group: int  # elements of k in a group
    groups: int


def _sizes(
    name: str,
    qweight: Words,
    qzeros: Words | None,
    scales: tuple[int, ...],
    g_idx: tuple[int, ...] | None,
    bits: int,
    group_size: int,
) -> _Sizes:
    """Check all shapes. K is what `g_idx` says: the last words may be padded."""
    at = partial(_words.joined, name)
    _words.check_matrix(at("qweight"), qweight.shape)
    rows, n = qweight.shape
    k = rows * qweight.bits // bits
    if g_idx is not None:
        if len(g_idx) != 1 or ceil_div(g_idx[0] * bits, qweight.bits) != rows:
            raise ValueError(f"{at('g_idx')} must have shape ({k},) for {rows} rows of words, got {g_idx}")
        k = g_idx[0]
    group, groups = _words.group_of(group_size, k)
    why = f"K = {k}, N = {n} and group_size {group_size}"
    _words.check_shape(at("scales"), scales, (groups, n), why)
    if qzeros is not None:
        _words.check_shape(at("qzeros"), qzeros.shape, (groups, ceil_div(n * bits, qzeros.bits)), why)
    return _Sizes(n, k, group, groups)


def _zero_points(
    name: str, qzeros: npt.NDArray[Any] | None, sizes: _Sizes, bits: int, sym: bool, checkpoint_format: str
) -> npt.NDArray[np.int16]:
    """-> (G, N)."""
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    at = _words.joined(name, "qzeros")
    if qzeros is None and not sym:
        raise ValueError(f"{at} must be given where zero points are not symmetric, got None")
    if qzeros is None:
        return np.full((sizes.groups, sizes.n), middle, np.int16)
    stored = fields(qzeros, bits, axis=1)[:, : sizes.n].astype(np.int16)
    if sym:
        least, greatest = stored.min(), stored.max()
        if least != greatest or least not in (middle - 1, middle):
            raise ValueError(
                f"{at} must hold {middle - 1} or {middle} everywhere where sym is true, got {least} to {greatest}"
            )
        return np.full_like(stored, middle)
    if checkpoint_format != "gptq":
        return stored
    if (stored == most).any():
        warnings.warn(
            f"{at} holds {most}, which stands for a zero point of {most + 1}, or is what AutoGPTQ makes of 0, which "
            "damages those beside it",
            stacklevel=3,
        )
    return stored + np.int16(1)


def _permutation(name: str, g_idx: npt.NDArray[Any], sizes: _Sizes) -> npt.NDArray[np.intp] | None:
    """-> the order in which the columns are in groups one after the other, None where they already are."""
    wanted = np.arange(sizes.k) // sizes.group
    if np.array_equal(g_idx, wanted):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], wanted):
        raise ValueError(
            f"{_words.joined(name, 'g_idx')} must have {sizes.group} of each of 0 to {sizes.groups - 1}, and only of "
            f"the last what is left, got {g_idx.min()} to {g_idx.max()}"
        )
    return order
