"""Tests of whole runs: training, checkpoints, answers that are asked for ahead of time, and several processes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from trl_refplug.testing.bench import Attached, Bench, require
from trl_refplug.testing.fixtures import Setting
from trl_refplug.testing.ranks import on_two_ranks
from trl_refplug.testing.samples import make_batch


class TrainingTests(Setting):
    def test_trains(self, attached: Attached) -> None:
        attached.needs_determinism()
        before = [parameter.detach().clone() for parameter in attached.policy.parameters()]
        attached.trainer.train()
        losses = _losses(attached)
        require(len(losses) == 2 and all(map(math.isfinite, losses)), f"The losses of two steps of DPO were {losses}.")
        after = attached.policy.parameters()
        require(
            any(not torch.equal(one, two.detach()) for one, two in zip(before, after, strict=True)),
            "Two steps of DPO changed none of the policy's weights.",
        )

    def test_reference_stays(self, bench: Bench) -> None:
        if bench.capabilities.moving:
            pytest.skip("capabilities.moving is declared: see test_reference_moves")
        attached = bench.attach()
        before = attached.ask_rows(attached.batch)
        attached.train()
        attached.require_same(
            attached.ask_rows(attached.batch),
            before,
            "The reference is another one after two steps of training. It must be what it was in pin(): copy or "
            "digest it there, or declare Capabilities(moving=True) if it follows the policy.",
        )

    def test_reference_moves(self, bench: Bench) -> None:
        if not bench.capabilities.moving:
            pytest.skip("capabilities.moving is not declared: see test_reference_stays")
        attached = bench.attach()
        before = attached.ask_rows(attached.batch)
        attached.train()
        require(
            attached.differs(attached.ask_rows(attached.batch), before),
            "capabilities.moving is declared, and two steps of training did not move the reference. Move it in "
            "on_step_end(); in `reference`, choose options with which it moves at every step.",
        )

    def test_resumes(self, bench: Bench) -> None:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole = bench.attach(**saving)
        whole.train()
        resumed = bench.attach(**saving)
        resumed.trainer.train(resume_from_checkpoint=str(bench.directory / "out" / "checkpoint-2"))
        expected, found = _losses(whole)[2:], _losses(resumed)[2:]
        same = len(found) == 2 and all(abs(one - two) < 1e-3 for one, two in zip(found, expected, strict=True))
        if not same:
            whole.needs_determinism()
        require(
            same,
            f"Losses after a resume are {found}, and {expected} in the uninterrupted run: the reference is another "
            "one. pin() sees the policy as it was passed in, before any checkpoint is loaded: fix the reference "
            "there. What moves must be in save_state() and load_state().",
        )

    def test_metadata_is_json(self, attached: Attached) -> None:
        metadata = attached.provider.metadata()
        try:
            written = json.loads(json.dumps(metadata))
        except (TypeError, ValueError) as error:
            pytest.fail(f"metadata() is written into every checkpoint as JSON, and cannot be: {error}.", pytrace=False)
        require(isinstance(written, dict), f"metadata() returned {metadata!r}; expected a dictionary.")


class OverlapTests(Setting):
    @pytest.fixture
    def ahead(self, attached: Attached) -> Attached:
        if not attached.provider.capabilities.overlap:
            pytest.skip("capabilities.overlap is not declared, so submit() is never called")
        return attached

    def test_submit(self, ahead: Attached) -> None:
        expected = ahead.ask(ahead.batch)
        with torch.no_grad():
            answer = ahead.provider.submit(ahead.batch.copy()).result(timeout=60)
        ahead.require_same(
            list(answer), list(expected), "submit(batch).result() is not what log_probs(batch) answers."
        )

    def test_several_in_flight(self, ahead: Attached) -> None:
        device = ahead.batch.input_ids.device
        batches = [make_batch(list(reversed(ahead.rows))[: 2 + index]).to(device) for index in range(3)]
        expected = [ahead.ask_rows(batch) for batch in batches]
        with torch.no_grad():
            futures = [ahead.provider.submit(batch.copy()) for batch in batches]
            answers = [future.result(timeout=60) for future in reversed(futures)][::-1]
        for batch, answer, values in zip(batches, answers, expected, strict=True):
            mask = batch.labels[:, 1:] != -100
            right_form = tuple(answer.shape) == tuple(mask.shape)
            require(right_form, f"With several batches in flight, one of {list(mask.shape)} got {list(answer.shape)}.")
            ahead.require_same(
                [row[chosen] for row, chosen in zip(answer, mask, strict=True)],
                values,
                "With several batches in flight, one future has another batch's answer. Results may be asked for in "
                "any order.",
            )


class RankTests(Setting):
    def test_two_ranks(self, bench: Bench) -> None:
        alone = bench.attach()
        alone.needs_determinism()
        expected = alone.ask_rows(alone.batch)
        ranks = on_two_ranks(bench)
        for rank, (digest, values) in sorted(ranks.items()):
            require(
                digest == alone.provider.identity().digest,
                f"On rank {rank} of two the identity is {digest}; in one process, {alone.provider.identity().digest}.",
            )
            alone.require_same(
                [torch.tensor(row) for row in values],
                expected,
                f"Rank {rank} of two processes answers otherwise than a single process does.",
            )


def _losses(attached: Attached) -> list[Any]:
    return [entry["loss"] for entry in attached.trainer.state.log_history if "loss" in entry]
