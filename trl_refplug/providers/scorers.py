"""Scoring with a model of the trainer's, as the trainer's flags say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trl_refplug.scoring import Scorer


if TYPE_CHECKING:
    from torch import nn

    from trl_refplug.provider import ReferenceContext


def trainer_scorer(model: nn.Module, context: ReferenceContext, mode: Literal["exact", "packed"]) -> Scorer:
    """A [`Scorer`] for a model that TRL has placed, with the temperature and head that TRL has given it."""
    cast_lm_head = getattr(context.args, "cast_lm_head_to_fp32", False)
    return Scorer(model, mode=mode, temperature=context.temperature, cast_lm_head_to_fp32=cast_lm_head)
