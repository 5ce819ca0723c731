"""pyda8w4 in vLLM on CPUs: a plug-in that vLLM finds by itself.

Where this package is installed beside vLLM, GPTQ, AWQ, compressed-tensors and auto-round checkpoints of 4 bits, and
those that pyda8w4 saved, run on its kernels without an option. ``--quantization pyda8w4`` serves more: float models,
which are quantized as they are loaded, GGUF files, and what ``pyda8w4 convert`` wrote. docs/serving.md says how.

vLLM calls `register` in each of its processes. Nothing of vLLM is imported before, and where it runs on another device
than the CPU nothing changes.
"""

from __future__ import annotations

import warnings

__all__ = ["register"]

# What the tests passed with.
TESTED = ("0.32.0",)


def register() -> None:
    """Make vLLM know the quantization ``"pyda8w4"``: the entry point of the group ``vllm.general_plugins``.

    Warns
    -----
    UserWarning
        If this version of vLLM was not tested.

    Notes
    -----
    vLLM may call it several times.
    """
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if vllm.__version__.partition("+")[0] not in TESTED:
        warnings.warn(
            f"pyda8w4 was tested with vLLM {', '.join(TESTED)}, not with {vllm.__version__}: if it fails, "
            "VLLM_PLUGINS='' leaves it out",
            stacklevel=2,
        )
    from pyda8w4.vllm import _config, _files, _loader

    _config.register()
    _loader.register()
    _files.register()
