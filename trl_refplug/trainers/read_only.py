"""Showing the reference's weights in a way in which nobody can change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from trl_refplug.errors import ReferenceMismatchError


_READERS = {"requires_grad_", "__setstate__"}
"""Methods whose names look as if they wrote to a tensor, but which do not change its values."""


class ReadOnlyParameter(nn.Parameter):
    """A parameter that shares the memory of one of the reference's. Whoever writes to it gets an error."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = dict(kwargs or {})
        written = [kwargs["out"]] if kwargs.get("out") is not None else []
        if _writes(name, function) and args:
            written += args[0] if isinstance(args[0], list | tuple) else [args[0]]  # torch._foreach_add_ takes a list
        if any(isinstance(tensor, ReadOnlyParameter) for tensor in written):
            raise write_error(f"{name}() on one of its parameters")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        return _guarded(result, args)


def _writes(name: str, function: Any) -> bool:
    """Whether a function writes to its first argument, as `add_`, `x[i] = y` and `x.data = y` do."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in _READERS
    sets_data = name == "__set__" and function.__self__ is torch.Tensor.data
    return in_place or name == "__setitem__" or sets_data


def _guarded(result: Any, args: Any) -> Any:
    """What a function returned. If it is a view of one of the reference's parameters, it is made read-only as well."""
    if isinstance(result, Tensor) and not isinstance(result, ReadOnlyParameter) and not result.is_meta:
        memory = result.untyped_storage().data_ptr()
        if any(isinstance(each, ReadOnlyParameter) and _memory(each) == memory for each in args):
            return read_only(result)
    return result


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().data_ptr()


def read_only(tensor: Tensor) -> nn.Parameter:
    """
    `tensor` as a parameter that cannot be written to. A tensor subclass (a quantized weight) is returned as it is.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return cast(nn.Parameter, tensor)
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(ReadOnlyParameter)


def write_error(what: str) -> ReferenceMismatchError:
    """The error for an attempt to change the reference from outside."""
    return ReferenceMismatchError(
        f"Something outside of the provider tried to change the reference: {what}. The reference of a run is the one "
        "that was declared. For one that follows the policy use a provider that declares `moving`, as TRL's "
        "`sync_ref_model=True` does."
    )
