"""Tests that the answers are the log-probs of the declared reference, in whatever way the provider is asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_refplug.errors import ConfigurationError
from trl_refplug.provider import ReferenceBatch
from trl_refplug.rows.answers import form_problem
from trl_refplug.testing.bench import Attached, Bench, largest_difference, require
from trl_refplug.testing.fixtures import Setting
from trl_refplug.testing.samples import SampleRow, image_preference_data, make_batch, scored, tiny_image_processor


_TEMPERATURE = 0.7


class AnswerTests(Setting):
    def test_form(self, attached: Attached) -> None:
        with torch.no_grad():
            answer = attached.provider.log_probs(attached.batch.copy())
        problem = form_problem(answer, attached.batch)
        require(not problem, f"{problem}. Entry [row, t] of the answer is the log-prob of labels[row, t + 1].")

    def test_deterministic(self, attached: Attached) -> None:
        size, where = largest_difference(attached.ask_rows(attached.batch), attached.ask_rows(attached.batch))
        require(
            size <= attached.tolerance,
            f"Two identical calls are answered differently, by up to {size:.3g} nats (tolerance "
            f"{attached.tolerance:g}), at {where}. Usually it is dropout: the reference's model is in train mode, as "
            "the policy it was copied from is. Call model.eval() in setup(). Tests that compare values are skipped "
            "until answers repeat.",
        )

    def test_values(self, attached: Attached, bench: Bench) -> None:
        attached.require_same(
            attached.ask_rows(attached.batch),
            self._expected_rows(bench, attached.batch),
            "The answer is not the declared reference's log-probs. Entry [row, t] belongs to labels[row, t + 1], "
            "given all tokens before it. If your reference is not the policy as it is passed in, override "
            "expected_log_probs() to say what it is.",
        )

    def test_zero_where_nothing_is_scored(self, attached: Attached) -> None:
        answer = attached.ask(attached.batch)
        others = answer[~scored(attached.batch)]
        require(
            bool((others == 0).all()),
            f"{int((others != 0).sum())} of {others.numel()} entries are not 0 where the shifted label is -100. The "
            "trainer sums over whole rows: return torch.where(batch.labels[:, 1:] != -100, log_probs, 0.0).",
        )

    def test_row_with_nothing_scored(self, attached: Attached) -> None:
        batch = attached.batch.copy()
        batch.labels[1] = -100
        with torch.no_grad():
            answer = attached.provider.log_probs(batch.copy())
        usual = attached.ask(attached.batch)
        require(
            bool(answer[1].isfinite().all()),
            "A row without any label (a completion that was cut away) is answered with values that are not finite.",
        )
        others, mask = [0, 2, 3], scored(batch)
        attached.require_same(
            [answer[row][mask[row]] for row in others],
            [usual[row][mask[row]] for row in others],
            "A row without any label changes the values of the other rows in its batch.",
        )

    def test_padding_side(self, attached: Attached) -> None:
        right = attached.ask_rows(attached.batch)
        left = attached.ask_rows(make_batch(attached.rows, padding="left").to(attached.batch.input_ids.device))
        attached.require_same(
            left,
            right,
            "Rows that are padded on the left (as GRPO's prompts are) get other values than padded on the right. Pass "
            "the attention mask on, and take positions from labels, not from lengths.",
        )

    def test_padding_content(self, attached: Attached, bench: Bench) -> None:
        # Only the mask says which ids are padding: the padding id may occur in completions, and other ids in padding.
        usual = make_batch(attached.rows, padding="left").to(attached.batch.input_ids.device)
        if attached.differs(attached.ask_rows(usual), self._expected_rows(bench, usual)):
            pytest.skip("needs the right values with padding on the left, see test_padding_side")
        padding_id, other_id = int(usual.input_ids[-1, 0]), attached.rows[0].tokens[0]
        rows = [SampleRow((*row.tokens[:-2], padding_id, row.tokens[-1]), row.prompt) for row in attached.rows]
        batch = make_batch(rows, padding="left", pad_token_id=other_id).to(attached.batch.input_ids.device)
        attached.require_same(
            attached.ask_rows(batch),
            self._expected_rows(bench, batch),
            "The values are wrong where the padding id occurs in a completion, or another token fills the padding. "
            "Tokens count where attention_mask is 1, whatever they are: do not compare input_ids with the padding id.",
        )

    def test_rows_alone(self, attached: Attached) -> None:
        together = attached.ask_rows(attached.batch)
        device = attached.batch.input_ids.device
        alone = [attached.ask_rows(make_batch([row]).to(device))[0] for row in attached.rows]
        attached.require_same(
            alone, together, "A row gets other values alone than in a batch with others: rows are independent."
        )

    def test_row_order(self, attached: Attached) -> None:
        usual = attached.ask_rows(attached.batch)
        order = [2, 0, 3, 1]
        moved = attached.ask_rows(
            make_batch([attached.rows[index] for index in order]).to(attached.batch.input_ids.device)
        )
        attached.require_same(
            moved,
            [usual[index] for index in order],
            "A row gets other values at another place in its batch. If you sort rows, put the answers back in order.",
        )

    def test_answer_is_the_callers(self, attached: Attached) -> None:
        expected = attached.ask(attached.batch)
        with torch.no_grad():
            first = attached.provider.log_probs(attached.batch.copy())
            attached.provider.log_probs(make_batch(attached.rows[::-1]).to(attached.batch.input_ids.device))
        attached.require_same(
            list(first),
            list(expected),
            "An answer changed when the next batch was asked for. Do not reuse its memory.",
        )
        first.fill_(7.0)
        attached.require_same(
            list(attached.ask(attached.batch)),
            list(expected),
            "The caller changed an answer in place, and the next answer has the change in it. Return a copy of what "
            "you keep: .clone().",
        )

    def test_broken_weights_are_not_hidden(self, bench: Bench) -> None:
        broken = bench.attach()
        broken.ask(broken.batch)
        with torch.no_grad():
            for parameter in bench.policy.parameters():
                parameter.fill_(float("nan"))
            expected = self._truth(bench, broken.batch, 1.0)
        if expected[scored(broken.batch)].isfinite().all():
            pytest.skip("the reference does not depend on the policy's weights")
        try:
            broken = bench.attach()
            with torch.no_grad():
                answer = broken.provider.log_probs(broken.batch.copy())
        except Exception:
            return
        require(
            not answer[scored(broken.batch)].isfinite().all(),
            "The reference's weights are NaN and the answer is finite. Never repair values (nan_to_num, clamp): "
            "training stops with a message when they are not finite, and must.",
        )

    def test_temperature(self, bench: Bench) -> None:
        if not bench.capabilities.temperature:
            with pytest.raises(ConfigurationError, match="temperature"):
                bench.attach_online(_TEMPERATURE)
            return
        try:
            attached = bench.attach_online(_TEMPERATURE)
        except ConfigurationError as error:
            pytest.skip(f"refuses trainers that generate: {error}")
        self._needs_values(bench)
        attached.require_same(
            attached.ask_rows(attached.batch),
            self._expected_rows(bench, attached.batch, _TEMPERATURE),
            f"At temperature {_TEMPERATURE} the answer is not the reference's. Divide logits by context.temperature "
            "before the softmax, or declare Capabilities(temperature=False) to have such runs refused.",
        )

    def test_images(self, bench: Bench, image_policy: Any) -> None:
        if not bench.capabilities.multimodal:
            pytest.skip("capabilities.multimodal is not declared, so batches with images are refused")
        pytest.importorskip("PIL")
        from trl_refplug.trainers.requested_batches import preference_requests

        self._needs_values(bench)
        bench = bench.using(policy=image_policy, processing_class=tiny_image_processor())
        attached = bench.attach(dataset=image_preference_data(), max_length=None)
        trainer = attached.trainer
        inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
        batch = preference_requests(inputs)[0].to(trainer.args.device)
        attached.require_same(
            attached.ask_rows(batch),
            self._expected_rows(bench, batch),
            "For a batch with images the answer is not the reference's. Pass batch.extras on to the model, or declare "
            "Capabilities(multimodal=False).",
        )

    def _expected_rows(self, bench: Bench, batch: ReferenceBatch, temperature: float = 1.0) -> list[Tensor]:
        """The expected log-probs of each row, at its scored positions."""
        expected = self._truth(bench, batch, temperature)
        return [values[chosen] for values, chosen in zip(expected, scored(batch), strict=True)]

    def _truth(self, bench: Bench, batch: ReferenceBatch, temperature: float) -> Tensor:
        # It is in evaluation mode, so that authors can call the policy as they get it.
        return self.expected_log_probs(copy.deepcopy(bench.policy).eval(), batch.copy(), temperature)

    def _needs_values(self, bench: Bench) -> None:
        """Skip the test if `test_values` fails: this test would only fail again, for the same reason."""
        plain = bench.attach()
        if plain.differs(plain.ask_rows(plain.batch), self._expected_rows(bench, plain.batch)):
            pytest.skip("needs the right values, see test_values")
