"""What every checkpoint looks like, whatever files it comes from."""

from __future__ import annotations

import warnings
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyda8w4._checks import check_flag
from pyda8w4._concat import concat, concat_parts
from pyda8w4._experts import PackedExperts, stack
from pyda8w4._filesystem import release
from pyda8w4._packed import PackedWeight
from pyda8w4._quantize import quantize
from pyda8w4._quantized import QuantizedWeight
from pyda8w4._safetensors import Tensor
from pyda8w4.formats._layer import Layer, matrix_of

_GROUP = 32  # of what is quantized again
_PART = 1 << 22  # elements that are packed at once

_Change = Callable[[PackedWeight], PackedWeight]


class Checkpoint:
    """The weights of a model, by name. Made by `open`.

    Parameters
    ----------
    path : Path
        Where it is.
    metadata : dict
        What the files say of the model: config.json of a folder (and generation_config.json in it, under that name
        without ".json"), the values of a GGUF file.
    layers : mapping of str to Layer
        All that it has, by name.
    mapped : sequence of ndarray, optional
        Files of which only what is being read need be in memory.

    Attributes
    ----------
    types : dict of str to str
        Names, and how each is stored: "Q4_K", "GPTQ 4-bit", "BF16", ... Quantized layers of folders have the
        path of their module ("model.layers.0.self_attn.q_proj"), all else the name of its tensor.
    shapes : dict of str to tuple of int
        Of the floats that they stand for: (N, K), or (E, N, K) of a stack of experts.
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Any],
        layers: Mapping[str, Layer],
        mapped: Sequence[npt.NDArray[np.uint8]] = (),
    ) -> None:
        self.path: Path = path
        self.metadata: dict[str, Any] = metadata
        self._mapped = mapped
        self._layers = dict(layers)
        self.types: dict[str, str] = {name: layer.type for name, layer in layers.items()}
        self.shapes: dict[str, tuple[int, ...]] = {name: layer.shape for name, layer in layers.items()}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.types)} tensors)"

    def __reduce__(self) -> tuple[Any, ...]:
        from pyda8w4.checkpoints import open  # which imports this module

        return open, (self.path,)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """Give a tensor as floats: dequantized, as its format defines it.

        Parameters
        ----------
        name : str
            One of `types`.

        Returns
        -------
        ndarray of float32
            Of the shape in `shapes`; may be written to.

        Raises
        ------
        TypeError
            If `name` is no str.
        ValueError
            If there is no such tensor, or it cannot be dequantized.
        """
        layer = self._layer(name)
        if not layer.is_stack or (layer.read is None and layer.floats is None):
            return self._floats(name, layer, 0)
        out = np.empty(layer.shape, np.float32)
        for index, matrix in enumerate(out):
            matrix[...] = self._floats(name, layer, index)
        return out

    def weight(self, name: str, index: int = 0) -> QuantizedWeight:
        """Give a quantized matrix before it is packed, for those who change it: take its rows in another order.

        Parameters
        ----------
        name : str
            One of `types`.
        index : int
            Which matrix of a stack.

        Returns
        -------
        QuantizedWeight
            Exactly what the file has.

        Raises
        ------
        TypeError, ValueError
            As `packed`.
        """
        return self._read(name, self._layer(name), index)

    def packed(self, name: str, index: int | None = None, *, requantize: bool = False) -> PackedWeight:
        """Give a matrix as a packed weight.

        Parameters
        ----------
        name : str
            One of `types`.
        index : int, optional
            Which matrix of a stack; of a matrix, none is needed.
        requantize : bool
            Whether a matrix that cannot be packed exactly, such as one of floats, is dequantized and
            quantized to 4 bits in groups of 32.

        Returns
        -------
        PackedWeight
            `PackedWeight.dequantize` gives what `array` gives, unless it was quantized again.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If there is no such matrix, or it cannot be packed exactly and `requantize` does not allow
            otherwise: the message says why.

        Warns
        -----
        UserWarning
            When a matrix is quantized again: what that cost.
        """
        requantize = check_flag("requantize", requantize)
        layer = self._layer(name)
        if index is None or not layer.is_stack:
            self._matrix(name)
        packed, error = self._pack(name, layer, 0 if index is None else index, requantize)
        if error is not None:
            self._warn(name, error, stacklevel=3)
        return packed

    def stack(self, *names: str | Sequence[str], requantize: bool = False) -> PackedExperts:
        """Give the weights of experts, as `pyda8w4.moe` takes them.

        Parameters
        ----------
        *names : str or sequence of str
            A stack (E, N, K), or the matrices (N, K) of all experts in their order. Of several, what each expert has
            of one and of the next are joined along N, as `pyda8w4.concat` does: gates and ups that the checkpoint
            keeps apart.
        requantize : bool
            As for `packed`.

        Returns
        -------
        PackedExperts
            Of shape (E, sum of N, K). Of a file of packed weights, one stack is mapped and not copied.

        Raises
        ------
        TypeError
            As `packed`.
        ValueError
            As `packed`; and if there are no experts, not as many in one as in the next, or their weights cannot be
            stacked or joined: `pyda8w4.stack` and `pyda8w4.concat` say which.

        Warns
        -----
        UserWarning
            As `packed`, once for a stack.

        Notes
        -----
        Beside the result, one expert is in memory at a time.

        In gpt-oss gates and ups alternate in the rows of one stack. They stay so: `pyda8w4.moe` takes them with
        ``interleaved=True``.

        Examples
        --------
        >>> checkpoint.stack("blk.0.ffn_down_exps.weight")  # doctest: +SKIP
        >>> checkpoint.stack("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")  # doctest: +SKIP
        >>> gates = [f"model.layers.0.mlp.experts.{i}.gate_proj" for i in range(128)]  # doctest: +SKIP
        >>> ups = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(128)]  # doctest: +SKIP
        >>> checkpoint.stack(gates, ups)  # doctest: +SKIP
        """
        return self._stacked(names, check_flag("requantize", requantize))

    def _stacked(self, names: Sequence[Any], requantize: bool, change: _Change | None = None) -> PackedExperts:
        packed, errors = self._stack(names, requantize, change)
        for name, error in errors.items():
            self._warn(name, error)
        return packed

    def _stack(
        self, names: Sequence[Any], requantize: bool, change: _Change | None = None
    ) -> tuple[PackedExperts, dict[str, float]]:
        """-> the experts; and by names what was quantized again, with the error of `_pack`, or the worst of a stack.

        `change` makes of the weight of each expert another.
        """
        experts = _Experts(self, names, requantize, change)
        if (packed := experts.packed()) is not None:
            return packed, {}
        try:
            return stack(experts), experts.errors
        except ValueError as error:
            if error is experts.refused:
                raise
            raise self._refused(f"names must be of weights that can be stacked: {error}") from None

    def _layer(self, name: str) -> Layer:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        if name not in self._layers:
            names = sorted(self._layers)
            at = bisect(names, name)
            neighbours = names[max(at - 500, 0) : at + 500]  # of many, comparing all would take seconds
            near = get_close_matches(name, neighbours, 3, cutoff=0.4) or list(self._layers)[:3]
            has = f" (it has {', '.join(near)}; checkpoint.types has all)" if near else ""
            raise self._refused(f"name must be of a tensor in the checkpoint, got {name!r}{has}")
        return self._layers[name]

    def _matrix(self, name: str) -> Layer:
        layer = self._layer(name)
        if len(layer.shape) != 2:
            self._check_whole(name, layer)
            hint = "; stack takes it" if layer.is_stack else ""
            raise self._refused(f"name must be of a matrix, got {name} of shape {layer.shape}{hint}")
        return layer

    def _check_whole(self, name: str, layer: Layer) -> None:
        """Raise ValueError for a layer that is damaged: the shape of such is not known."""
        if layer.refusal is not None and layer.floats is None:
            raise self._refused(f"{name} of {layer.type} cannot be packed exactly: {layer.refusal}")

    def _read(self, name: str, layer: Layer, index: int, rows: slice | None = None) -> QuantizedWeight:
        if layer.read is None:
            why = layer.refusal or "it is not quantized"
            hint = "" if layer.floats is None else "; requantize=True quantizes it"
            raise self._refused(f"{name} of {layer.type} cannot be packed exactly: {why}{hint}")
        self._check_index(name, layer, index)
        self._release()
        try:
            return layer.read(index) if rows is None or layer.read_rows is None else layer.read_rows(index, rows)
        except ValueError as error:
            raise self._refused(f"{name} of {layer.type} cannot be read: {error}") from None

    def _parts(self, name: str, layer: Layer, index: int) -> Iterator[PackedWeight]:
        """Some rows after others, where that can be: with a byte for each code they take much memory."""
        slices: list[slice | None] = [None]
        if layer.read_rows is not None:
            n, k = layer.shape[-2:]
            step = max(1, _PART // k // 32) * 32
            slices = [slice(begin, begin + step) for begin in range(0, n, step)]
        for rows in slices:
            weight = self._read(name, layer, index, rows)
            try:
                packed = weight.pack()
            except ValueError as error:
                raise self._refused(f"{name} of {layer.type} cannot be packed: {error}") from None
            del weight
            yield packed

    def _check_index(self, name: str, layer: Layer, index: int) -> None:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"index must be an int, got {type(index).__name__}")
        if not 0 <= index < (layer.shape[0] if layer.is_stack else 1):
            raise self._refused(f"index must be of a matrix of {name} of shape {layer.shape}, got {index}")

    def _warn(self, name: str, error: float, stacklevel: int = 4) -> None:
        layer = self._layers[name]
        up_to = "up to " if layer.is_stack else ""
        warnings.warn(
            f"{name} of {layer.type} was quantized to 4 bits in groups of {_GROUP}, with an error of {up_to}"
            f"{error:.1%} of its root mean square",
            stacklevel=stacklevel,
        )

    def _pack(self, name: str, layer: Layer, index: int, requantize: bool) -> tuple[PackedWeight, float | None]:
        """-> the weight; and if it was quantized again, the error as a part of the root mean square."""
        self._check_index(name, layer, index)
        if requantize and layer.read is None:
            return self._requantized(name, layer, index)
        try:
            if layer.packed is not None:
                return matrix_of(self._read_packed(name, layer), index), None
            return concat_parts(layer.shape[-2], self._parts(name, layer, index)), None
        except ValueError:
            # Some reasons are seen only where the tensors are read.
            if requantize and layer.floats is not None:
                return self._requantized(name, layer, index)
            raise

    def _read_packed(self, name: str, layer: Layer) -> PackedWeight | PackedExperts:
        assert layer.packed is not None
        try:
            return layer.packed()
        except ValueError as error:
            raise self._refused(f"{name} of {layer.type} cannot be read: {error}") from None

    def _floats(self, name: str, layer: Layer, index: int) -> npt.NDArray[np.float32]:
        self._release()
        try:
            if layer.floats is not None:
                if index == 0:  # of a stack, whose matrices come one after another: all of it has one checksum
                    self._verify(layer)
                # Scales that are not finite, and numbers beyond float32, give what such operations give.
                with np.errstate(all="ignore"):
                    return np.require(layer.floats(index), np.float32, ["C", "W"])
        except ValueError as error:
            raise self._refused(f"{name} of {layer.type} cannot be dequantized: {error}") from None
        if layer.read is not None:
            return self._pack(name, layer, index, requantize=False)[0].dequantize()
        why = layer.refusal or "its elements are no floats"
        raise self._refused(f"{name} of {layer.type} cannot be dequantized: {why}")

    def _requantized(self, name: str, layer: Layer, index: int) -> tuple[PackedWeight, float]:
        w = self._floats(name, layer, index)
        try:
            packed = quantize(w, _GROUP)
        except ValueError as error:
            raise self._refused(f"{name} of {layer.type} cannot be quantized: {error}") from None
        return packed, _relative_error(packed, w)

    def _stored(self, name: str) -> Tensor | None:
        """A tensor as it is in the file, where that can be, once it has its checksum."""
        layer = self._layers[name]
        self._release()
        try:
            self._verify(layer)
        except ValueError as error:
            raise self._refused(f"{name} of {layer.type} cannot be read: {error}") from None
        return layer.stored

    def _verify(self, layer: Layer) -> None:
        if layer.verify is not None:
            layer.verify()

    def _release(self) -> None:
        """What was read before is packed, or floats, by now."""
        for data in self._mapped:
            release(data)

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: {why}")


class _Experts:
    """The weights of experts, each of which is packed when its turn comes.

    Parameters
    ----------
    checkpoint : Checkpoint
        That has them.
    names : sequence of str or sequence of str
        As `Checkpoint.stack` takes them.
    requantize : bool
        See there.
    change : callable, optional
        Makes of a weight another.

    Attributes
    ----------
    errors : dict of str to float
        Of what was quantized again so far.
    refused : ValueError or None
        What was raised where weights were read or joined.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[Any], requantize: bool, change: _Change | None) -> None:
        self._checkpoint, self._requantize, self._change = checkpoint, requantize, change
        self._parts = [self._part(part) for part in names]
        if not self._parts:
            raise checkpoint._refused("names must be of at least one stack, got none")
        counts = [count for _, count in self._parts]
        if len(set(counts)) > 1:
            raise checkpoint._refused(f"names must be of equally many experts, got {' and '.join(map(str, counts))}")
        self.errors: dict[str, float] = {}
        self.refused: ValueError | None = None

    def _part(self, names: Any) -> tuple[str | Sequence[str], int]:
        """With the number of its experts, once it is seen to have some of one shape."""
        checkpoint = self._checkpoint
        if isinstance(names, str):
            layer = checkpoint._layer(names)
            if not layer.is_stack:
                checkpoint._check_whole(names, layer)
                raise checkpoint._refused(f"names must be of a stack (E, N, K), got {names} of shape {layer.shape}")
            if 0 in layer.shape:
                raise checkpoint._refused(f"{names} of {layer.type} cannot be packed: it has no elements")
            return names, layer.shape[0]
        if not isinstance(names, Sequence):
            raise TypeError(f"names must be a str or a sequence of str, got {type(names).__name__}")
        shapes = {checkpoint._matrix(name).shape: None for name in names}
        if not shapes:
            raise checkpoint._refused("names must be of at least one matrix, got none")
        if len(shapes) > 1:
            raise checkpoint._refused(f"names must be of matrices of one shape, got {' and '.join(map(str, shapes))}")
        return names, len(names)

    def packed(self) -> PackedExperts | None:
        """They as the file has them, where it has just these."""
        (names, _), *more = self._parts
        layer = self._checkpoint._layers[names] if isinstance(names, str) else None
        if more or layer is None or layer.packed is None or self._change is not None:
            return None
        found = self._checkpoint._read_packed(str(names), layer)
        assert isinstance(found, PackedExperts)
        return found

    def __len__(self) -> int:
        return self._parts[0][1]

    def __iter__(self) -> Iterator[PackedWeight]:
        return map(self._expert, range(len(self)))

    def _expert(self, expert: int) -> PackedWeight:
        try:
            packed = [self._matrix(names, expert) for names, _ in self._parts]
            joined = packed[0] if len(packed) == 1 else self._joined(packed, expert)
            return joined if self._change is None else self._change(joined)
        except ValueError as error:
            self.refused = error
            raise

    def _matrix(self, names: str | Sequence[str], expert: int) -> PackedWeight:
        name, index = (names, expert) if isinstance(names, str) else (names[expert], 0)
        packed, error = self._checkpoint._pack(name, self._checkpoint._layers[name], index, self._requantize)
        if error is not None:
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        return packed

    def _joined(self, packed: list[PackedWeight], expert: int) -> PackedWeight:
        try:
            return concat(packed)
        except ValueError as error:
            names = " and ".join(names if isinstance(names, str) else names[expert] for names, _ in self._parts)
            raise self._checkpoint._refused(f"{names} cannot be joined: {error}") from None


def _relative_error(packed: PackedWeight, w: npt.NDArray[np.float32]) -> float:
    """Of all elements, by parts: of a large matrix no second copy is made."""
    rows = max(1, (1 << 20) // w.shape[1])
    error = size = 0.0
    for top in range(0, len(w), rows):
        part = w[top : top + rows].astype(np.float64)
        error += float(np.square(packed.dequantize(slice(top, top + rows)) - part).sum())
        size += float(np.square(part).sum())
    return (error / size) ** 0.5 if size else 0.0
