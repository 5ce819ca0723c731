"""Models of transformers from checkpoints, with the weights that these have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

import pyda8w4.checkpoints
from pyda8w4._checks import SCHEMES, check_flag, check_scheme
from pyda8w4.checkpoints import Checkpoint
from pyda8w4.torch import _folder, _gguf
from pyda8w4.torch._parts import Recipe
from pyda8w4.torch._tensors import FLOATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_checkpoint(
    path: str | os.PathLike[str], *, act: str = "uint8", dtype: torch.dtype | None = None, requantize: bool = False
) -> PreTrainedModel:
    """Make a model of transformers that has the quantized weights of a checkpoint, exactly.

    Parameters
    ----------
    path : path-like
        What `pyda8w4.checkpoints.open` takes: a folder of Hugging Face, a GGUF file, or what ``pyda8w4 convert`` made
        of either.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        How the layers quantize activations, see `pyda8w4.linear`.
    dtype : torch.dtype, optional
        Of what is not quantized, and of what layers pass on: float32, bfloat16 or float16. None means what config.json
        says, and float32 for GGUF files.
    requantize : bool
        Whether matrices that are quantized in a way that cannot be packed exactly are quantized again, to 4 bits in
        groups of 32.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode. Quantized matrices are `DA8W4Linear` and `DA8W4Embedding` modules, those of experts
        `DA8W4Experts`; an output head that is tied to the embedding shares its packed weight. All that the checkpoint
        keeps in float is as transformers has it.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    OSError
        If a file cannot be read.
    ValueError
        If the checkpoint is damaged, its model is not one that can be made, or a matrix cannot be packed exactly and
        `requantize` does not allow otherwise. Every tensor of the checkpoint is used, and every parameter of the
        model comes from it: otherwise the message says which does not.
    ImportError
        If transformers is not installed, or gguf for a GGUF file.

    Warns
    -----
    UserWarning
        When a matrix is quantized again: what that cost.

    Notes
    -----
    Quantized matrices, and experts, are packed one after another, and never made dense: at its peak this needs the
    memory of the result and what it takes to pack one of them. A quantized tensor that no layer here can hold, such as
    that of a convolution or of a subclass of Linear that does more than multiply, becomes floats, which are the same
    numbers.

    GGUF files of these architectures are known: gemma, gemma2, gemma3, gpt-oss, granite, llama (also with experts),
    olmo2, phi3, qwen2, qwen2moe, qwen3, qwen3moe and smollm3. What llama.cpp changes in them is undone: the order of
    rows of q and k, norms that are stored with 1 added, and gates and ups of gpt-oss apart.

    ``model.save_pretrained`` writes the packed weights, which ``from_pretrained`` loads once
    `pyda8w4.torch.transformers` is imported.

    Examples
    --------
    >>> import pyda8w4.torch
    >>> model = pyda8w4.torch.from_checkpoint("model-Q4_K_M.gguf")  # doctest: +SKIP
    >>> model.generate(**inputs)  # doctest: +SKIP
    """
    check_scheme("act", act, tuple(SCHEMES))
    check_flag("requantize", requantize)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    try:
        from pyda8w4.torch import transformers
        from pyda8w4.torch._filling import Filling
    except ImportError as error:
        raise ImportError("from_checkpoint needs transformers 5: pip install transformers", name=error.name) from error

    checkpoint = pyda8w4.checkpoints.open(path)
    recipe = recipe_of(checkpoint)
    filling = Filling(checkpoint, recipe.parts, act, requantize)
    with transformers.filled_by(filling):
        model, report = recipe.model.from_pretrained(
            None,
            config=recipe.config,
            state_dict=filling.state,
            dtype=dtype or getattr(recipe.config, "dtype", None) or torch.float32,
            quantization_config=transformers.DA8W4Config(act=act),
            generation_config=recipe.generation,
            output_loading_info=True,
        )
    kind = type(model).__name__
    wrong = {
        f"in no {kind}": report["unexpected_keys"],
        f"not in the checkpoint, but in {kind}": report["missing_keys"],
    }
    for where, names in wrong.items():
        if names:
            first, *more = sorted(names)
            others = f" (and {len(more)} more)" if more else ""
            raise ValueError(f"{checkpoint.path}: {first}{others} is {where}")
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)
    return model


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """What model it is of. ValueError for one that transformers has not, or that is not known."""
    if "general.architecture" in checkpoint.metadata:
        return _gguf.recipe(checkpoint)
    return _folder.recipe(checkpoint)
