"""Connecting to a server, and checking before the first step that it has the reference that the run declares."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from trl_refplug.errors import ConfigurationError, ReferenceMismatchError
from trl_refplug.models.adapters import is_peft
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.identity import digest_model
from trl_refplug.models.positions import absolute_positions, batch_length_limit
from trl_refplug.models.tolerances import TOLERANCES, tolerance_for
from trl_refplug.provider import ReferenceContext, ReferenceIdentity
from trl_refplug.rows import Row
from trl_refplug.serving import RefPlugClient, ScoringClient, Transport, VllmClient, tokenizer_digest


if TYPE_CHECKING:
    from trl_refplug.providers.options import RemoteOptions

logger = logging.getLogger("trl_refplug")


def connect(
    transport: Transport, context: ReferenceContext, options: RemoteOptions
) -> tuple[ScoringClient, ReferenceIdentity]:
    """
    Connect to a server of `trl-refplug serve`, and check that it has the reference that is declared.

    Raises:
        RemoteError: No server answers, or its answer is wrong.
        ReferenceMismatchError: It serves another model.
    """
    client = RefPlugClient(transport)
    facts = client.served_model
    if options.starts_as_policy:
        expected = _policy_digests(context)
        if facts.digest not in expected:
            policy: Any = context.policy
            dtype = str(policy.dtype).removeprefix("torch.")
            hint = f" Their precision differs: serve with --dtype {dtype}." if dtype != facts.dtype else ""
            raise ReferenceMismatchError(
                f"{transport.urls[0]} serves {facts.model} ({facts.dtype}, digest {facts.digest}), which is not the "
                f"policy as it starts ({dtype}, digest {' or '.join(expected)}).{hint} If the reference is meant to "
                "be another model, or of another precision, say so with option starts_as_policy=false."
            )
    if getattr(context.args, "cast_lm_head_to_fp32", False) and facts.dtype != "float32":
        raise ConfigurationError(
            f"`cast_lm_head_to_fp32=True` has the policy's LM head compute in float32, and {transport.urls[0]} "
            f"computes in {facts.dtype}. Serve with --dtype float32, or set it to False."
        )
    digest = facts.digest
    if _mixed_precision(context) != "no":
        # In the trainer's process, the same weights would compute under autocast, and give other values.
        digest = xxhash.xxh3_128_hexdigest(f"{digest} computed in {facts.dtype}".encode())
    details = {"model": facts.model, "adapter": facts.adapter, "dtype": facts.dtype, "protocol": "refplug"}
    return client, ReferenceIdentity("remote", digest, details)


def connect_vllm(
    transport: Transport, context: ReferenceContext, options: RemoteOptions
) -> tuple[ScoringClient, ReferenceIdentity]:
    """
    Connect to an OpenAI-compatible server. Such a server cannot say which weights it has, so a row of the probe is
    sent with every request, and its answer is compared.

    Raises:
        RemoteError: No server answers, or its answer is wrong.
        ReferenceMismatchError: It serves another model.
    """
    policy: Any = context.policy
    tolerance = TOLERANCES[torch.bfloat16]  # it is not known what the server computes in
    if options.starts_as_policy:
        tolerance = tolerance_for(_mixed_precision(context), policy.dtype, context.args.device.type)
    model = causal_lm(policy)
    client = VllmClient(
        transport,
        model=options.model,
        probe_row=None if context.probe_rows is None else Row(context.probe_rows[0], context.probe_rows[0]),
        tolerance=tolerance,
        left_padding=not absolute_positions(model),
        batch_limit=batch_length_limit(model),
    )
    names = [client.model]
    if options.starts_as_policy:
        names += _policy_digests(context)[:1]
    digest = xxhash.xxh3_128_hexdigest(repr(("vllm", *names)).encode())
    return client, ReferenceIdentity("remote", digest, {"model": client.model, "protocol": "vllm"})


def dtype_of(client: ScoringClient, options: RemoteOptions) -> str | None:
    """The dtype that the server computes in; `None` if it is that of the policy."""
    if isinstance(client, RefPlugClient):
        return client.served_model.dtype
    return None if options.starts_as_policy else "bfloat16"  # nothing says what an unknown server computes in


def check_tokenizer(client: ScoringClient, processing_class: Any) -> None:
    """
    Check that the run's token ids stand for the same text on the server. If the server has no tokenizer to compare
    with, only warn.

    Raises:
        ReferenceMismatchError: The server's model has another tokenizer, or a smaller vocabulary.
    """
    if not isinstance(client, RefPlugClient):
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    ours, facts = tokenizer_digest(tokenizer), client.served_model
    if ours is not None and len(tokenizer) > facts.vocab_size:
        raise ReferenceMismatchError(
            f"The tokenizer has {len(tokenizer):,} tokens, and the reference that is served ({facts.model}) only "
            f"{facts.vocab_size:,}. Serve a model of the same vocabulary."
        )
    if ours is not None and facts.tokenizer is None:
        logger.warning(
            "%s serves %s without a tokenizer, so nothing shows that token ids stand for the same text there as in "
            "this run. Save the tokenizer beside that model and serve it again to have this checked.",
            client.transport.urls[0],
            facts.model,
        )
    elif ours is not None and ours != facts.tokenizer:
        raise ReferenceMismatchError(
            f"The run's tokenizer is not that of the reference that is served, {facts.model}: the same ids stand for "
            f"other text there (digests {ours} and {facts.tokenizer}). Serve a model of the same vocabulary."
        )


def _policy_digests(context: ReferenceContext) -> list[str]:
    """The digests that the policy as it starts may have: with the adapter that it came with, and without it."""
    policy: Any = context.policy
    digests = [digest_model(policy)]
    if is_peft(policy) and isinstance(policy.active_adapter, str):
        digests.insert(0, digest_model(policy, adapter=policy.active_adapter))
    return digests


def _mixed_precision(context: ReferenceContext) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(context.args, name, False)), "no")
