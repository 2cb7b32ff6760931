"""
`ref_monitor_steps`: how far the policy has drifted from the declared reference.

Every so many optimizer steps both are asked about the batch at hand, whether the trainer itself uses a reference or
not. The policy is asked as it is before the step, without dropout and without gradient, and no random number is drawn:
training goes on as if nobody had looked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_refplug.errors import SeamError
from trl_refplug.runtime.random_state import rng_kept
from trl_refplug.trainers.policy import policy_log_probs
from trl_refplug.trainers.reference_model import ReferenceModel
from trl_refplug.trainers.requested_batches import completions_at_hand


class DriftMonitor:
    """
    Measures the drift of one trainer's policy.

    Args:
        reference ([`ReferenceModel`]): Whom to ask, past the trainer's own questions.
        steps (`int`): Optimizer steps from one measurement to the next.
    """

    def __init__(self, reference: ReferenceModel, steps: int) -> None:
        self._reference = reference
        self._steps = steps
        self._looked_in: int | None = None
        self._last: dict[str, float] = {}

    def training_begins(self) -> None:
        """Steps are counted from where training begins or goes on."""
        self._looked_in = None

    def look(self, trainer: Any, inputs: Any) -> None:
        """The trainer is about to compute its loss on `inputs`: measure, if this is the first batch of such a step."""
        step = trainer.state.global_step + 1
        if not trainer.model.training or step % self._steps or step == self._looked_in:
            return
        self._looked_in = step
        batch = completions_at_hand(inputs)
        if batch is None:
            raise SeamError(
                f"`ref_monitor_steps={self._steps}` reads the batches that TRL's trainers make, and this one is a "
                f"{type(inputs).__name__} without their columns. Set `ref_monitor_steps=0`."
            )
        with torch.no_grad(), rng_kept(), trainer.accelerator.autocast():
            policy = policy_log_probs(trainer.model, batch)
            reference = self._reference.look(batch)
        self._last = drift(policy.to(reference.device), reference, batch.labels[:, 1:].to(reference.device) != -100)

    def take(self) -> dict[str, float]:
        """The last measurement since the last call; empty if there was none."""
        last, self._last = self._last, {}
        return last


def drift(policy: Tensor, reference: Tensor, scored: Tensor) -> dict[str, float]:
    """
    Estimates of the KL divergence of the policy from the reference, per token in nats, from tokens of the policy.

    Args:
        policy (`Tensor`), reference (`Tensor`): Log-probs, `[batch, seq - 1]`.
        scored (`Tensor`): bool, the same shape: which of them count.

    Returns:
        `dict[str, float]`: `kl`, `kl_p99` and `kl_max`: mean, 99th percentile and maximum of the log-ratio, the
        estimator k1. `kl_k3`: mean of k3 (Schulman, 2020), which is never negative. Empty if no token counts.
    """
    k1 = (policy.double() - reference.double())[scored].cpu().numpy()
    if not len(k1):
        return {}
    k3 = np.expm1(-k1) + k1
    return {
        "kl": float(k1.mean()),
        "kl_p99": float(np.quantile(k1, 0.99)),
        "kl_max": float(k1.max()),
        "kl_k3": float(k3.mean()),
    }
