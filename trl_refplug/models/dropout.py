"""The dropout of the policy. Its reference has none."""

from __future__ import annotations

from torch import nn


def disable_functional_dropout(model: nn.Module) -> None:
    """
    Set every dropout that is a plain number, such as `attention_dropout`, to zero.

    TRL's `disable_dropout` only finds `nn.Dropout` modules. With the numbers left as they are, a noisy policy would be
    compared with a reference that has no noise.
    """
    for module in model.modules():
        for name in _dropout_attributes(module):
            setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether any dropout of `model`, module or number, is active when it is in train mode."""
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
