"""Refusing PEFT policies whose base model cannot be the reference, because training would change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trl_refplug.errors import ImpureReferenceError
from trl_refplug.models.identity import adapter_attributes, adapter_tensor_name, digest_tensors


def check_policy(policy: Any, provider: str) -> None:
    """
    Refuse a PEFT policy if training would change the weights of its base model, or would change nothing at all.

    Raises:
        ImpureReferenceError: It names all problems that were found, each with its remedy.
    """
    problems = []
    for name, config in policy.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            problems.append(
                f"adapter {name!r} has bias={bias!r}: it trains biases of the base model in place, so the reference "
                "drifts. Set bias='none' in the adapter's configuration, or use ref_provider='frozen'."
            )
    attributes = adapter_attributes(policy)
    trainable = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    base = [name for name in trainable if adapter_tensor_name(name, attributes) is None]
    if problems:
        base = [name for name in base if not name.endswith("bias")]  # these were named above
    if base:
        problems.append(
            f"{len(base)} weights of the base model are trainable ({base[0]}, ...), so the reference drifts. Freeze "
            "them, move the modules to `modules_to_save` of the adapter, or use ref_provider='frozen'."
        )
    if not trainable:
        problems.append(
            "the policy's adapter has nothing trainable, so training would change nothing. Load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    if problems:
        raise ImpureReferenceError(f"ref_provider={provider!r} cannot use this policy: " + " Also: ".join(problems))


def rewritten_tensors(before: Mapping[str, str], policy: Any, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """
    The names of the base tensors that were changed when PEFT wrapped the model, as PiSSA, OLoRA, CorDA, LoftQ, ... do.

    Args:
        before (`Mapping[str, str]`): The digests of all base tensors before that.
        dtypes (`Mapping[str, torch.dtype]`): Their dtypes before that. A tensor that was cast to a wider dtype (as
            `cast_lm_head_to_fp32` does with the LM head) has the same values, and does not count as changed.
    """
    after = digest_tensors(policy, dtypes=dtypes)
    return [name for name, digest in before.items() if name in after and after[name] != digest]
