"""What would make a policy's own base an impure reference, and how to fix it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trl_refplug.errors import ImpureReferenceError
from trl_refplug.models.identity import adapter_attributes, adapter_tensor_name, digest_tensors


def check_policy(policy: Any, provider: str) -> None:
    """
    Refuse a PEFT policy whose base weights would move with training, or that would not train at all.

    Raises:
        ImpureReferenceError: All problems found, each with its remedy.
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
        base = [name for name in base if not name.endswith("bias")]  # already named
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
    Names of base tensors that wrapping with PEFT changed (PiSSA, OLoRA, CorDA, LoftQ, ... rewrite them).

    Args:
        before (`Mapping[str, str]`): The digests of all before.
        dtypes (`Mapping[str, torch.dtype]`): Their dtypes before: a cast to a wider one (of the LM head, by
            `cast_lm_head_to_fp32`) changes no value.
    """
    after = digest_tensors(policy, dtypes=dtypes)
    return [name for name, digest in before.items() if name in after and after[name] != digest]
