"""`ref_check`: on the first reference call of training, is this the reference that was declared?"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.models.tolerances import Tolerance, tolerance_for
from trl_refplug.provider import ReferenceBatch, ReferenceIdentity
from trl_refplug.trainers.policy import policy_log_probs


logger = logging.getLogger("trl_refplug")


_ROWS_SHOWN = 5


def check_against_policy(
    trainer: Any, batch: ReferenceBatch, log_probs: Tensor, *, identity: ReferenceIdentity, strict: bool
) -> None:
    """
    Compare the first reference log-probs with the policy's own, which has not moved yet.

    Raises:
        ReferenceMismatchError: They differ beyond rounding (`strict`; else a warning).
    """
    expected = policy_log_probs(trainer.model, batch).to(log_probs.device)
    scored = batch.labels[:, 1:] != -100
    difference = torch.where(scored, (log_probs - expected).abs(), 0.0)
    count = scored.sum().clamp(min=1)
    tolerance = _tolerance(trainer)
    largest, mean = difference.max().item(), (difference.sum() / count).item()
    if largest <= tolerance.largest and mean <= tolerance.mean:
        logger.info("ref_check passed: %s equals the policy within %.1e nats per token.", identity, largest)
        return
    message = (
        f"The reference {identity} was declared to be the policy as it starts, and its log-probs are not the "
        f"policy's: they differ by {mean:.3g} nats per token on average (tolerance {tolerance.mean:g}) and by up to "
        f"{largest:.3g} (tolerance {tolerance.largest:g}).\n{_table(log_probs, expected, scored)}\n"
        "Likely causes: the policy was changed after the trainer was built; the reference is another revision, "
        "precision or chat template; a custom model draws random numbers in eval mode. If this reference is what you "
        "want, declare it (name a model or an adapter), or set `ref_check` to 'warn' or 'off'."
    )
    if strict:
        raise ReferenceMismatchError(message)
    logger.warning(message)


def _tolerance(trainer: Any) -> Tolerance:
    dtype = getattr(trainer.accelerator.unwrap_model(trainer.model), "dtype", torch.float32)
    return tolerance_for(str(trainer.accelerator.mixed_precision), dtype, trainer.accelerator.device.type)


def _table(log_probs: Tensor, expected: Tensor, scored: Tensor) -> str:
    lines = ["row  scored tokens  reference sum  policy sum  largest difference"]
    off = (log_probs - expected).abs().masked_fill(~scored, 0.0).amax(dim=1)
    for row in off.argsort(descending=True)[:_ROWS_SHOWN].tolist():
        mask = scored[row]
        lines.append(
            f"{row:>3}  {int(mask.sum()):>13}  {log_probs[row][mask].sum().item():>13.4f}"
            f"  {expected[row][mask].sum().item():>10.4f}  {off[row].item():>18.4g}"
        )
    return "\n".join(lines)
