"""Evaluation mode, entered and left without changing what mode each module was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch `model` to evaluation mode and back, module by module: a frozen part may have been in it before."""
    training = [module for module in model.modules() if module.training and not _is_repacked(module)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def stay_in_evaluation_mode(model: nn.Module) -> None:
    """Put a model that is never trained in evaluation mode, where it scores as it would inside [`evaluation_mode`]."""
    for module in model.modules():
        module.training = _is_repacked(module)


def _is_repacked(module: nn.Module) -> bool:
    # On a CPU, bitsandbytes' layers rewrite their weights in place for another, less precise kernel when they run in
    # evaluation mode. They have no dropout to switch off.
    return type(module).__module__.startswith("bitsandbytes.")
