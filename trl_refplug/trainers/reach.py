"""TRL's trainers that compare the policy with another model in a way that no provider can answer, and why."""

from __future__ import annotations


_SCORES = "and a provider scores completions that are there already"
_DISTRIBUTIONS = "and a provider gives the log-probs of given tokens only"

WHY_NOT = {
    "A2POTrainer": f"its first stage samples completions from the reference, {_SCORES}",
    "AsyncDistillationTrainer": f"its loss compares the most likely tokens of its teacher, {_DISTRIBUTIONS}",
    "DistillationTrainer": f"its loss compares whole distributions with those of its teacher, {_DISTRIBUTIONS}",
    "GKDTrainer": f"its loss compares whole distributions with those of its teacher, {_DISTRIBUTIONS}",
    "GOLDTrainer": f"its loss compares whole distributions with those of its teacher, {_DISTRIBUTIONS}",
    "IWOPDTrainer": f"its loss compares whole distributions with those of its teacher, {_DISTRIBUTIONS}",
    "OnlineDPOTrainer": f"it calls its reference for logits and picks the log-probs out itself, {_DISTRIBUTIONS}",
    "SDFTTrainer": f"its teacher reads another prompt, and its loss compares whole distributions, {_DISTRIBUTIONS}",
    "SDPOTrainer": f"its teacher reads another prompt, and its loss compares whole distributions, {_DISTRIBUTIONS}",
    "ServerDistillationTrainer": f"its loss compares the most likely tokens of its teacher, {_DISTRIBUTIONS}",
}
"""By the name of the class: what completes the sentence "it cannot take its reference from a provider, because"."""


def why_not(trainer_class: type) -> str:
    """Why a class, or one that it is made of, cannot take its reference from a provider; empty if nothing is known."""
    for base in trainer_class.__mro__:
        if base.__module__.split(".")[0] == "trl" and base.__name__ in WHY_NOT:
            return WHY_NOT[base.__name__]
    return ""
