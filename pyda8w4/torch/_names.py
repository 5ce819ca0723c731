"""Names of tensors in checkpoints and in models, between which transformers translates as it loads and saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)


class Transforms:
    """What transformers does to the names of tensors."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def rename(self, key: str, prefix: str | None = None, own: Any = None, reverse: bool = False) -> tuple[str, bool]:
        """The new name, and whether tensors are cut or joined."""
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, prefix, own, reverse)
        return renamed, pattern is not None

    def merged(self, key: str) -> int | None:
        """Which part along N of a stack a matrix and its like become; None where something else is done to them."""
        _, pattern = rename_source_key(key, self._renamings, self._converters)
        for one in self._converters:
            if pattern in one.source_patterns:
                sources, operations = one.source_patterns, one.operations
                merges = type(operations[0]) is MergeModulelist and operations[0].dim == 0
                joins = len(operations) == 2 and type(operations[1]) is Concatenate and operations[1].dim == 1
                if merges and len(one.target_patterns) == 1 and (joins or len(operations) == len(sources) == 1):
                    return int(sources.index(pattern))
        return None


class Names:
    """What the tensors of a checkpoint are called in a model."""

    def __init__(self, model: Any, more: Iterable[str] = ()) -> None:
        self._transforms, self._prefix = Transforms(get_model_conversion_mapping(model)), model.base_model_prefix
        self._own = dict.fromkeys([*model.state_dict(), *more], True)

    def __call__(self, stored: str) -> str:
        """The name, whether the model has it or not."""
        return self.find(stored)[0]

    def find(self, stored: str) -> tuple[str, bool]:
        """The name, and whether this is the first of tensors that the stored ones are cut or joined to."""
        renamed, joined = self._transforms.rename(stored, self._prefix, self._own)
        if renamed not in self._own and stored in self._own:
            return stored, False
        return renamed, joined

    def merged(self, stored: str) -> int | None:
        """See `Transforms.merged`."""
        return self._transforms.merged(stored)
