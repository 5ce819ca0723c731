"""How the layers of a model quantize activations, set for all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyda8w4._checks import SCHEMES, check_scheme
from pyda8w4.torch._experts import DA8W4Experts
from pyda8w4.torch._module import DA8W4Linear

# Of what models of transformers take, the tensors that have a position for each token.
_POSITIONS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


def set_act(model: nn.Module, act: str, token_act: str | None = None) -> None:
    """Set how all packed layers of a model quantize activations.

    Parameters
    ----------
    model : torch.nn.Module
        With packed layers: `DA8W4Linear`, `DA8W4Experts`.
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        See `pyda8w4.linear`.
    token_act : str, optional
        The same for calls of the model with one position for each sequence, as ``generate`` makes them for tokens after
        the prompt. Their time is that of reading weights, so that ``int16`` costs nothing there. None is `act`.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If there is no such scheme, or the model has no packed layers.

    Notes
    -----
    With `token_act`, hooks look at each call of this model (not of parts of it, nor of its ``forward``): the second
    dimension of ``input_ids``, ``inputs_embeds`` or the first argument says how many positions there are. For a call
    with one the layers have `token_act`, and `act` again behind it. A sequence then has the same results alone and in a
    batch; but a token has not, alone and in a prompt. Calls from several threads at a time need one `act` for all.
    Setting again takes the hooks away. ``save_pretrained`` of transformers writes what is set.

    Examples
    --------
    >>> import torch
    >>> import pyda8w4.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    >>> print(pyda8w4.torch.quantize_(model, group_size=32))
    replaced 1 of 1 Linear layers
    >>> pyda8w4.torch.set_act(model, "int8_group", token_act="int16")
    >>> with torch.no_grad():
    ...     model(torch.ones(1, 1, 64)).shape
    torch.Size([1, 1, 32])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_scheme("act", act, tuple(SCHEMES))
    if token_act is not None:
        check_scheme("token_act", token_act, tuple(SCHEMES))
    if not _set(model, act):
        raise ValueError("model must have packed layers, got one without")
    for module in model.modules():
        for hooks, options in (
            (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
            (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Switch)]:
                del hooks[key]
                for option in options:
                    del option[key]
    if token_act is not None and token_act != act:
        model.register_forward_pre_hook(_Switch(token_act), with_kwargs=True)
        model.register_forward_hook(_Switch(act), with_kwargs=True, always_call=True)
    adapter = sys.modules.get("pyda8w4.torch.transformers")
    if adapter is not None:
        adapter.set_acts(model, act, token_act)


def _set(model: nn.Module, act: str) -> int:
    """-> how many layers there are."""
    layers = [module for module in model.modules() if isinstance(module, (DA8W4Linear, DA8W4Experts))]
    for layer in layers:
        layer.act = act
    return len(layers)


class _Switch:
    """A hook before calls with one position, and one behind them. It holds no layers: it is copied with its model."""

    def __init__(self, act: str) -> None:
        self.act = act

    def __call__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *out: Any) -> None:
        if _positions(args, kwargs) == 1:
            _set(model, self.act)


def _positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many; 0 where nothing tells."""
    for value in (*(kwargs.get(name) for name in _POSITIONS), *args[:1]):
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return int(value.shape[1])
    return 0
