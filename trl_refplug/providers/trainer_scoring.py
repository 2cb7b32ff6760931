"""Making scorers for models that the trainer has placed, as the trainer's flags say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import AutocastKwargs

from trl_refplug.scoring import Scorer


if TYPE_CHECKING:
    from torch import nn

    from trl_refplug.provider import ReferenceContext


def trainer_scorer(model: nn.Module, context: ReferenceContext, mode: Literal["exact", "packed"]) -> Scorer:
    """
    A [`Scorer`] for a model that TRL has placed. It uses the temperature and the LM head that TRL gave the model.
    """
    cast_lm_head = getattr(context.args, "cast_lm_head_to_fp32", False)
    return Scorer(model, mode=mode, temperature=context.temperature, cast_lm_head_to_fp32=cast_lm_head)


@contextmanager
def trainer_precision(accelerator: Any) -> Iterator[None]:
    """
    Compute in mixed precision as training does. Before training, accelerate has not prepared the policy for that yet;
    if it has, this changes nothing. Casts are not kept, because they would be a second copy of the weights.
    """
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        yield
