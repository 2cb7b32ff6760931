"""What a fused LM head takes for granted: that logits are hidden states times the output embedding's own weight."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from trl_refplug.errors import UnsupportedInputError
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.sharding import full_shape


def check_output_embedding(model: nn.Module) -> None:
    """
    Refuse to score a model whose output embedding does more than multiply its weight. A fused LM head, TRL's as well
    as ours, multiplies that weight itself, so whatever else happens there would be left out of the log-probs.

    Raises:
        UnsupportedInputError: An adapter, a hook or a forward method of its own is at work there.
    """
    head: Any = causal_lm(model).get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        return  # its weight is that of the module in use
    if isinstance(head, BaseTunerLayer):
        adapters = {name for kind in head.adapter_layer_names for name in getattr(head, kind, ())}
        at_work = [name for name in head.active_adapters if name in adapters]
        if at_work and not head.disable_adapters and not head.merged:
            raise _left_out(
                f"Adapter {at_work[0]!r} sits on the model's output embedding (lm_head)",
                "Leave lm_head out of the adapter's `target_modules`, train it whole "
                "(`modules_to_save=['lm_head']`), or merge the adapter (`merge_and_unload()`).",
            )
        head = head.get_base_layer()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise _left_out(
            f"The model's output embedding is a {type(head).__name__}, which is more than one matrix",
            "Use a model whose output embedding is a torch.nn.Linear. With PEFT's `trainable_token_indices`, choose "
            "a model whose embeddings are not tied, or train them whole (`modules_to_save=['embed_tokens']`).",
        )
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    if any(not _fetches_weights(hook) for hook in hooks):
        raise _left_out("The model's output embedding has forward hooks", "Remove them.")


def _fetches_weights(hook: Any) -> bool:
    """Whether a hook is one of those with which FSDP, DeepSpeed and accelerate fetch the weights of a module."""
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.startswith(("torch.distributed.", "deepspeed.", "accelerate."))


def _left_out(found: str, remedy: str) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"{found}. A fused LM head multiplies the embedding's own weight and leaves out whatever is added there, in "
        f"TRL's trainers as well as here, so the log-probs would be another model's. {remedy}"
    )


def vocabulary_sizes(model: nn.Module) -> tuple[int, int]:
    """How many token ids the model takes, and how many it gives a log-prob to."""
    inner = causal_lm(model)
    embeddings: Any = inner.get_input_embeddings(), inner.get_output_embeddings()
    taken, given = (full_shape(embedding.weight)[0] for embedding in embeddings)
    return taken, given


def check_token_ids(model: nn.Module, largest_id: int, largest_label: int) -> None:
    """
    Refuse rows that the model has no tokens for.

    Raises:
        UnsupportedInputError: A token id is not in the model's vocabulary, or a label is not in that of its head.
    """
    taken, given = vocabulary_sizes(model)
    if largest_id >= taken or largest_label >= given:
        found, size = (largest_id, taken) if largest_id >= taken else (largest_label, given)
        raise UnsupportedInputError(
            f"Found token id {found}, and the model that is to score it knows {size:,} tokens only. The reference "
            "needs the policy's vocabulary: name a model of the same tokenizer, or resize its embeddings "
            "(`resize_token_embeddings`) before the trainer is built."
        )
