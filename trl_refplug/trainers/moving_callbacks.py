"""Callbacks of TRL that would move the reference, behind the back of the provider that answers for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from trl_refplug.errors import ConfigurationError


_BEMA_MODULE = "trl.experimental.bema_for_ref_model.callback"
_BEMA_OPTIONS = (
    "update_freq",
    "ema_power",
    "bias_power",
    "lag",
    "update_after",
    "multiplier",
    "min_ema_multiplier",
    "ref_model_update_freq",
    "ref_model_update_after",
)


def refuse_moving_callbacks(callbacks: Iterable[Any], ref_model: Any, args: Any) -> None:
    """
    Refuse a callback that would move the reference while it trains.

    Args:
        callbacks: The trainer's callbacks.
        ref_model: What the trainer has as its reference model.
        args: The trainer's arguments.

    Raises:
        ConfigurationError: There is one. The message has the options with which the reference moves in the same way.
    """
    for callback in callbacks:
        kwargs = _bias_corrected(callback)
        if kwargs is None:
            kwargs = _mixed(callback, ref_model, args)
        if kwargs is not None:
            raise ConfigurationError(
                f"The trainer has the callback {type(callback).__name__}, which would move the reference model, and "
                "here a reference provider is the reference, which no callback can change. Remove the callback, and "
                f"have the reference move in the same way with ref_provider='ema', ref_provider_kwargs={kwargs}."
            )


def _bias_corrected(callback: Any) -> dict[str, Any] | None:
    """Return the options that do what a `BEMACallback(update_ref_model=True)` does; `None` if it is another one."""
    module = sys.modules.get(_BEMA_MODULE)  # if TRL's module was not imported, nobody has a callback of it
    if module is None or not isinstance(callback, module.BEMACallback) or not callback.update_ref_model:
        return None
    kwargs = {"average": "bema", **{name: getattr(callback, name) for name in _BEMA_OPTIONS}}
    if str(callback.device) == "cpu":
        kwargs["master_device"] = "cpu"
    return kwargs


def _mixed(callback: Any, ref_model: Any, args: Any) -> dict[str, Any] | None:
    """Return the options that do what a `SyncRefModelCallback` does; `None` if it does not move this reference."""
    from trl.trainer.callbacks import SyncRefModelCallback

    if not isinstance(callback, SyncRefModelCallback) or callback.ref_model is not ref_model:
        return None
    flags = {"alpha": "ref_model_mixup_alpha", "sync_steps": "ref_model_sync_steps"}
    return {option: getattr(args, flag) for option, flag in flags.items() if hasattr(args, flag)}
