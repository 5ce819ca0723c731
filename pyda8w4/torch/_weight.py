"""What a layer has as ``weight``: it tells about a float weight that does not exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class WeightStandIn(torch.Tensor):
    """Says dtype, device and shape, as model code asks of ``linear.weight``; raises where numbers are needed.

    It has no memory. A tensor on the meta device would not do: some operators of torch take one beside tensors on the
    CPU and return numbers that nothing has computed.
    """

    # The init functions of transformers leave tensors alone that say so.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> WeightStandIn:
        stand_in: WeightStandIn = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, unused-ignore]
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        return stand_in

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _SAME or (func in _TRAINING and not [*args[1:], *(kwargs or {}).values(), True][0]):
            return args[0]
        raise NotImplementedError(_refusal(func))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override, unused-ignore]
        cls, func: Any, types: object, args: object = (), kwargs: object = None
    ) -> Any:
        raise NotImplementedError(_refusal(func))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override, unused-ignore]
        return f"<packed weight: shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}>"

    def __deepcopy__(self, memo: object) -> WeightStandIn:
        return WeightStandIn(self.shape, self.dtype, self.device)

    def __reduce_ex__(self, protocol: object) -> Any:
        return WeightStandIn, (tuple(self.shape), self.dtype, self.device)


_Tensor: Any = torch.Tensor
_ATTRIBUTES = (
    "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps", "is_nested",
    "is_quantized", "is_sparse", "is_xpu", "itemsize", "layout", "ndim", "requires_grad", "shape",
)  # fmt: skip
_METHODS = (
    "__format__", "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "ndimension", "nelement", "numel", "size", "stride",
)  # fmt: skip
_DESCRIBING = {
    *(getattr(_Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(_Tensor, name)),
    *(getattr(_Tensor, name) for name in _METHODS),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_SAME = {_Tensor.data.__get__, _Tensor.detach, torch.detach}
_TRAINING = {_Tensor.requires_grad_, _Tensor.requires_grad.__set__}  # taken where they ask for none


def _refusal(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = f"`.{func.__self__.__name__}`"
    return (
        f"the weight of a DA8W4Linear is packed: it says its dtype, device and shape, but has no numbers for {name}. "
        "Call the layer; or keep it float, with filter_fn of quantize_ or modules_to_not_convert of DA8W4Config. "
        "layer.packed has the codes and scales"
    )
