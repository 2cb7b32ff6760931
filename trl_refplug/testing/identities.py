"""Tests that two references have the same identity if they give the same log-probs, and different ones if not."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.provider import ReferenceIdentity
from trl_refplug.testing.bench import Attached, Bench, require
from trl_refplug.testing.fixtures import Setting


class IdentityTests(Setting):
    def test_identity_is_json(self, attached: Attached) -> None:
        identity = attached.provider.identity()
        require(
            isinstance(identity, ReferenceIdentity), f"identity() returned {identity!r}; expected a ReferenceIdentity."
        )
        try:
            again = ReferenceIdentity.from_dict(json.loads(json.dumps(identity.to_dict())))
        except (TypeError, ValueError) as error:
            pytest.fail(
                f"The identity is written into every checkpoint as JSON, and cannot be: {error}.", pytrace=False
            )
        require(
            again == identity,
            f"The identity changes when it is written as JSON and read again: it is {again!r} then. Its `details` "
            "must hold strings, numbers, booleans, lists and dictionaries with text keys only.",
        )
        require(
            isinstance(identity.digest, str) and bool(identity.digest) and isinstance(identity.provider, str),
            f"The identity's digest ({identity.digest!r}) and provider ({identity.provider!r}) must be text.",
        )

    def test_identity_is_the_same_again(self, attached: Attached, bench: Bench) -> None:
        first = attached.provider.identity()
        other = bench.using(policy=_reloaded(bench.policy, bench.directory / "again")).attach()
        again = other.provider.identity()
        require(
            first.digest == again.digest,
            f"The same weights and options, loaded from another path, have another identity: {first}, then {again}. "
            "A run could not be resumed. Digest what changes the log-probs (trl_refplug.digest_model), "
            "nothing else: no path, time, id() or hash().",
        )

    def test_identity_follows_the_weights(self, attached: Attached, bench: Bench) -> None:
        try:
            other = bench.using(policy=_slightly_changed(bench.policy)).attach()
        except ReferenceMismatchError:
            return  # it refuses a policy that is not its reference
        _require_identities_fit_answers(
            attached,
            other,
            different="Another policy gives another reference, and its identity is the same. Caches and resumed runs "
            "would take one for the other. Digest the weights (trl_refplug.digest_model) in pin().",
            same="The answers do not depend on the policy's weights, and the identity does. A run "
            "could not be resumed with the same reference beside another policy.",
        )

    def test_identity_follows_the_options(
        self, attached: Attached, bench: Bench, other_options: Sequence[Mapping[str, Any]]
    ) -> None:
        if not other_options:
            pytest.skip("give a fixture `other_options` to compare the identities of several options")
        for options in other_options:
            _require_identities_fit_answers(
                attached,
                bench.with_options(options).attach(),
                different=f"Options {dict(options)} give another reference, and its identity is the same. Put "
                "every option that changes a value into the digest.",
                same=f"Options {dict(options)} give the same values, and the identity is another. Leave options "
                "that change no value out of the digest.",
            )

    def test_identity_stays_in_training(self, attached: Attached) -> None:
        before = attached.provider.identity()
        attached.train()
        after = attached.provider.identity()
        require(
            before == after,
            f"The identity changed in training, from {before} to {after}. It says which reference the run was "
            "started with: compute it in pin() and keep it.",
        )


def _require_identities_fit_answers(one: Attached, other: Attached, *, different: str, same: str) -> None:
    """Fail with `different` if only the answers differ, and with `same` if only the identities do."""
    __tracebackhide__ = True
    differ = one.differs(one.ask_rows(one.batch), other.ask_rows(other.batch))
    identities = one.provider.identity(), other.provider.identity()
    identities_differ = identities[0].digest != identities[1].digest
    shown = " and ".join(f"{identity.digest!r} of {identity}" for identity in identities)
    if differ:
        require(identities_differ, f"{different}\nDigests (details do not count): {shown}.")
    elif not one.provider.capabilities.moving:  # the answers of a reference that moves may differ later
        require(not identities_differ, f"{same}\nDigests (details do not count): {shown}.")


def _reloaded(policy: Any, directory: Path) -> Any:
    """The same policy, loaded from another directory."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if not isinstance(policy, PreTrainedModel):
        return copy.deepcopy(policy)
    policy.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=policy.dtype)


def _slightly_changed(policy: Any) -> Any:
    """A policy of the same shape in which every matrix is a little different."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.3 * (noise * parameter.detach().cpu().float().std()).to(parameter)
    return other
