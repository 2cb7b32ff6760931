"""Dropout of the policy, which its reference does not have."""

from __future__ import annotations

from torch import nn


def disable_functional_dropout(model: nn.Module) -> None:
    """
    What `disable_dropout` promises, also for dropout that is a number and not an `nn.Dropout`: TRL misses
    `attention_dropout`, so the policy would be compared with its reference under noise.
    """
    for module in model.modules():
        for name in _dropout_attributes(module):
            setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether any dropout is active in train mode."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or _dropout_attributes(module) for module in model.modules()
    )


def _dropout_attributes(module: nn.Module) -> list[str]:
    if isinstance(module, nn.Dropout):
        return []
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith("pdrop"))
    ]
