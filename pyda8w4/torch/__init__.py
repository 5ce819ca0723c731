"""pyda8w4 for torch models: a replacement of ``torch.nn.Linear`` that runs on the CPU, for inference.

>>> import torch
>>> import pyda8w4.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
>>> print(pyda8w4.torch.quantize_(model, group_size=32))
replaced 2 of 2 Linear layers
>>> with torch.no_grad():
...     model(torch.ones(3, 64)).shape
torch.Size([3, 8])

Not imported by ``import pyda8w4``. Needs torch 2.4 or later, of any build: nothing here is compiled
against it.
"""

try:
    import torch as _  # noqa: F401 to say what is missing
except ImportError as _error:
    raise ImportError("pyda8w4.torch needs torch: pip install 'pyda8w4[torch]'", name=_error.name) from _error

from pyda8w4.torch._act import set_act
from pyda8w4.torch._calibrate import calibrate
from pyda8w4.torch._checkpoint import from_checkpoint
from pyda8w4.torch._embedding import DA8W4Embedding
from pyda8w4.torch._experts import DA8W4Experts
from pyda8w4.torch._fuse import FusedPart, fuse_linears
from pyda8w4.torch._gated import GatedMLP, fuse_gated
from pyda8w4.torch._module import DA8W4Linear
from pyda8w4.torch._quantize import Report, quantize_

__all__ = [
    "DA8W4Embedding",
    "DA8W4Experts",
    "DA8W4Linear",
    "FusedPart",
    "GatedMLP",
    "Report",
    "calibrate",
    "from_checkpoint",
    "fuse_gated",
    "fuse_linears",
    "quantize_",
    "set_act",
]
