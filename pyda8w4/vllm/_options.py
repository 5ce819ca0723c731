"""What the user sets: ``--additional-config '{"pyda8w4": {"act": "int16"}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pyda8w4._checks import SCHEMES, check_flag, check_scheme
from pyda8w4._quantize import Rounding

# Layers of float models that choose experts: they decide more than they cost.
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Options:
    """How layers quantize.

    Parameters
    ----------
    act : {'uint8', 'int8', 'int8_group', 'int16'}
        How activations are quantized, see `pyda8w4.linear`.
    group_size : int
        Of float models: see `pyda8w4.quantize_weight`.
    method : {'search', 'minmax'}
        Of float models: see there.
    zeros : {'float', 'integer', 'none'}
        Of float models: see there.
    two_level : bool
        Of float models: see there.
    rotate : int
        Of float models: see there.
    modules_to_not_convert : sequence of str
        Of float models: names of modules, or parts of such, that stay float.
    requantize : bool
        Whether matrices of a checkpoint that cannot be packed exactly are quantized again, as by
        `pyda8w4.checkpoints.Checkpoint.packed`.
    """

    act: str = "uint8"
    group_size: int = 128
    method: str = "search"
    zeros: str = "float"
    two_level: bool = False
    rotate: int = 0
    modules_to_not_convert: tuple[str, ...] = ()
    requantize: bool = False

    @classmethod
    def of(cls, additional_config: Any) -> Options:
        """What vLLM was started with.

        Parameters
        ----------
        additional_config : mapping
            All of what the option says; that under "pyda8w4" is ours.

        Returns
        -------
        Options
            Checked.

        Raises
        ------
        TypeError
            If a value has the wrong type.
        ValueError
            If there is no such option, or it does not take the value.
        """
        where = 'additional_config["pyda8w4"]'
        given = additional_config.get("pyda8w4", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise TypeError(f"{where} must be an object, got {given!r}")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{where} must have some of {', '.join(known)}, got {name!r}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        self = cls(**values)
        check_scheme(f"act of {where}", self.act, tuple(SCHEMES))
        check_flag(f"requantize of {where}", self.requantize)
        if type(self.group_size) is not int or self.group_size < 4 or self.group_size % 4:
            raise ValueError(f"group_size of {where} must be a multiple of 4, got {self.group_size!r}")
        try:
            self.rounding  # noqa: B018
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        names = self.modules_to_not_convert
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"modules_to_not_convert of {where} must be a list of names, got {names!r}")
        return self

    @property
    def rounding(self) -> Rounding:
        """How weights of float models are quantized."""
        return Rounding(self.group_size, self.method, self.zeros, self.two_level, self.rotate)

    def keeps(self, name: str) -> bool:
        """Whether a layer of a float model stays float.

        Parameters
        ----------
        name : str
            Of the module.

        Returns
        -------
        bool
            Also of routers.
        """
        return name.rpartition(".")[2] in _ROUTERS or any(part in name for part in self.modules_to_not_convert)
