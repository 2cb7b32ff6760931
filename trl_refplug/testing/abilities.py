"""Tests of the optional abilities that a provider declares: taking a model, scoring in bulk, being stored."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from trl_refplug.errors import ConfigurationError, RefPlugError
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import ScoresInBulk
from trl_refplug.rows import PaddedRows
from trl_refplug.testing.bench import Attached, Bench, require
from trl_refplug.testing.fixtures import Setting
from trl_refplug.testing.samples import plain_log_probs, scored


class AbilityTests(Setting):
    def test_accepts_model(self, bench: Bench) -> None:
        if not bench.capabilities.accepts_model:
            pytest.skip("capabilities.accepts_model is not declared, so `ref_model=` is refused")
        given = copy.deepcopy(bench.policy)
        with torch.no_grad():
            for parameter in given.parameters():
                parameter.mul_(1.5)
        expected_of = copy.deepcopy(given).eval()
        try:
            attached = bench.attach(ref_model=given)
        except ConfigurationError as error:
            pytest.skip(f"the provider refuses a reference model with this policy: {error}")
        expected = plain_log_probs(expected_of, attached.batch, 1.0)
        mask = scored(attached.batch)
        attached.require_same(
            attached.ask_rows(attached.batch),
            [values[chosen] for values, chosen in zip(expected, mask, strict=True)],
            "capabilities.accepts_model is declared, and the answers are not those of the model that was passed as "
            "`ref_model=`. The constructor gets it as its keyword argument `model`: return it from pin().",
        )

    def test_bulk_scorer(self, attached: Attached) -> None:
        provider = attached.provider
        if not isinstance(provider, ScoresInBulk):
            pytest.skip("the provider has no bulk_scorer(), so a store asks it for one batch after the other")
        padded = PaddedRows.from_batch(attached.batch)
        expected = attached.ask_rows(attached.batch)
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad(), provider.bulk_scorer() as scorer:
            for answers in scorer.score_passes(iter(padded.rows)):
                require(
                    not any(index in found for index, _ in answers),
                    "bulk_scorer(): a row was answered more than once.",
                )
                found.update(answers)
        require(
            found.keys() == set(range(len(padded))),
            f"bulk_scorer(): rows {sorted(found)} of {len(padded)} were answered; expected every row once.",
        )
        attached.require_same(
            [found[index] for index in range(len(padded))],
            [values.cpu() for values in expected],
            "bulk_scorer() gives other values than log_probs() for the same rows.",
        )

    def test_as_source_of_a_store(self, bench: Bench, tmp_path: Path) -> None:
        can = bench.capabilities
        name = bench.reference[0] if isinstance(bench.reference, tuple) else bench.reference
        if not can.offline or can.moving or can.stored or not isinstance(name, str):
            pytest.skip("only for a provider that declares `offline`, tested under the name it is registered by")
        store = plugin_manager().able("stored")[0]
        options = {"path": str(tmp_path / "store"), "source": name, "source_kwargs": dict(bench.options)}
        alone = bench.attach()
        stored = bench.using(reference=(store, {**options, "fill": "lazy"})).attach()
        expected = alone.ask_rows(alone.batch)
        message = f"As the source of a store ({store}), the provider gives other values than as the reference itself."
        alone.require_same(stored.ask_rows(alone.batch), expected, message)
        alone.require_same(stored.ask_rows(alone.batch), expected, f"{message} They were read from the store.")

    def test_availability(self, attached: Attached) -> None:
        provider = attached.provider
        attached.ask(attached.batch)
        require(
            isinstance(provider.unavailable, str) and not provider.unavailable,
            f"`unavailable` is {provider.unavailable!r} right after setup(), where rows can be scored: it must be an "
            "empty string.",
        )
        require(
            provider.scoring in ("exact", "packed"),
            f"`scoring` is {provider.scoring!r}; expected 'exact' or 'packed'.",
        )

    def test_probe(self, attached: Attached, bench: Bench) -> None:
        attached.ask(attached.batch)
        try:
            bench.attach(ref_check="error")
        except RefPlugError as error:
            attached.needs_determinism()
            require(
                False,
                "The model that the provider declares (declared_model(): the policy if starts_as_policy, else what "
                f"pin() returned) and the provider give different log-probs for the same rows. {error}",
            )

    def test_probe_leaves_the_batch_alone(self, attached: Attached) -> None:
        batch = attached.batch.copy()
        with torch.no_grad():
            answer = attached.provider.probe(batch)
        require(
            all(
                torch.equal(one, two)
                for one, two in (
                    (batch.input_ids, attached.batch.input_ids),
                    (batch.attention_mask, attached.batch.attention_mask),
                    (batch.labels, attached.batch.labels),
                )
            ),
            "probe() changed the batch in place.",
        )
        if answer is not None:
            attached.require_same(
                list(answer), list(attached.ask(attached.batch)), "probe() does not answer as log_probs() does."
            )
