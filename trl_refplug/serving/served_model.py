"""
What a server says about itself: enough for a client to know whether it is the reference it wants.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import xxhash


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """
    Args:
        protocol (`int`): Version of the wire format.
        digest (`str`): Identity of the model: [`~trl_refplug.models.identity.digest_model`].
        model (`str`): Its name, for people.
        adapter (`str` or `None`): Path of the adapter on it.
        dtype (`str`): Of its weights.
        scoring (`str`): `"exact"` or `"packed"`.
        vocab_size (`int`): Ids the model knows.
        tokenizer (`str` or `None`): [`tokenizer_digest`] of its tokenizer; `None` where it has none.
        max_length (`int` or `None`): Longest row, in tokens.
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
    Digest of the vocabulary that a tokenizer's model was trained with: which id stands for which text. Tokens added
    later (padding, roles of a chat) are left out, as runs differ in them without the ids of a text changing. `None`
    for what has no vocabulary.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return None
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
    return xxhash.xxh3_64_hexdigest(json.dumps(vocabulary, sort_keys=True).encode())
