"""Put models in evaluation mode, and put every module back into the mode that it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Switch `model` to evaluation mode while the context lasts.

    Afterwards only the modules that were in train mode are put back into it: frozen parts of a model may have been in
    evaluation mode before.
    """
    training = [module for module in model.modules() if module.training and not _rewrites_its_weights(module)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def stay_in_evaluation_mode(model: nn.Module) -> None:
    """
    Put a model that is never trained in evaluation mode for good.

    Its log-probs are then the same inside and outside of [`evaluation_mode`], as both leave out the same modules.
    """
    for module in model.modules():
        module.training = _rewrites_its_weights(module)


def _rewrites_its_weights(module: nn.Module) -> bool:
    # When bitsandbytes' layers run in evaluation mode on a CPU, they rewrite their weights in place for a kernel that
    # is less precise. They have no dropout, so they can as well stay in train mode.
    return type(module).__module__.startswith("bitsandbytes.")
