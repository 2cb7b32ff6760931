"""Is this the server that the run means? What `remote` compares before the first step."""

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
    A client of `trl-refplug serve` whose server has the reference that is declared.

    Raises:
        RemoteError: No server answers, or not as it should.
        ReferenceMismatchError: It serves something else.
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
        # The same weights in the trainer's process would compute under autocast, and say something else
        digest = xxhash.xxh3_128_hexdigest(f"{digest} computed in {facts.dtype}".encode())
    details = {"model": facts.model, "adapter": facts.adapter, "dtype": facts.dtype, "protocol": "refplug"}
    return client, ReferenceIdentity("remote", digest, details)


def connect_vllm(
    transport: Transport, context: ReferenceContext, options: RemoteOptions
) -> tuple[ScoringClient, ReferenceIdentity]:
    """
    A client of an OpenAI-compatible server. Such a server cannot say which weights it has, so a row of the probe
    travels with every request.

    Raises:
        RemoteError: No server answers, or not as it should.
        ReferenceMismatchError: It serves something else.
    """
    policy: Any = context.policy
    tolerance = TOLERANCES[torch.bfloat16]  # nothing says what an unknown server computes in
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
    """The dtype that a server computes in; `None` for that of the policy."""
    if isinstance(client, RefPlugClient):
        return client.served_model.dtype
    return None if options.starts_as_policy else "bfloat16"  # nothing says what an unknown server computes in


def check_tokenizer(client: ScoringClient, processing_class: Any) -> None:
    """
    Compare what ids stand for; warn where only the run knows it.

    Raises:
        ReferenceMismatchError: The reference was trained on other ids.
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
    """What the policy as it starts may be called: with the adapter it came with, and without."""
    policy: Any = context.policy
    digests = [digest_model(policy)]
    if is_peft(policy) and isinstance(policy.active_adapter, str):
        digests.insert(0, digest_model(policy, adapter=policy.active_adapter))
    return digests


def _mixed_precision(context: ReferenceContext) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(context.args, name, False)), "no")
