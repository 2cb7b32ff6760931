"""
What a server says about its model, so that a client can check whether it is the reference that the run needs.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import xxhash


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """
    The answer to `GET /v1/identity`.

    Args:
        protocol (`int`): Version of the wire format.
        digest (`str`): Identity of the model: [`~trl_refplug.models.identity.digest_model`].
        model (`str`): Name of the model, for people.
        adapter (`str` or `None`): Path of the PEFT adapter on the model.
        dtype (`str`): Data type of the weights.
        scoring (`str`): `"exact"` or `"packed"`.
        vocab_size (`int`): Number of token ids that the model knows.
        tokenizer (`str` or `None`): [`tokenizer_digest`] of the tokenizer; `None` if there is none.
        max_length (`int` or `None`): Length of the longest row that the model takes, in tokens.
    """

    protocol: int
    digest: str
    model: str
    adapter: str | None
    dtype: str
    scoring: str
    vocab_size: int
    tokenizer: str | None
    max_length: int | None


def tokenizer_digest(tokenizer: Any) -> str | None:
    """
    Digest of a tokenizer's vocabulary, which says what text each id stands for. Tokens that were added later (padding,
    roles of a chat) are left out: they differ between runs, and do not change the ids of a text. `None` for an object
    without a vocabulary.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return None
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
    return xxhash.xxh3_64_hexdigest(json.dumps(vocabulary, sort_keys=True).encode())
