"""The probe: what it asks, when, what it says, and that it changes nothing else."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_refplug import Capabilities, ReferenceIdentity, ReferenceMismatchError, ReferenceProvider
from trl_refplug.models import probe as probing
from trl_refplug.models.weights import changed_weights, mark_weights, shared_weights

from .. import tiny
from .runs import KINDS, assert_same, build, train
from .test_adapter import lora


SAVING = {"save_strategy": "steps", "save_steps": 1}


class Harm(TrainerCallback):
    """Does something to the trainer as a step begins."""

    def __init__(self, what, step=2):
        self.what, self.step = what, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.what(self.trainer)


def harmed(tmp_path, what, args, **kwargs):
    harm = Harm(what)
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={**SAVING, **args}, callbacks=[harm], **kwargs)
    # The trainer has a copy of what it is given
    next(each for each in trainer.callback_handler.callbacks if isinstance(each, Harm)).trainer = trainer
    return trainer


def scale_base(trainer):
    trainer.model.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(1.01)


class TestRows:
    def test_first_row_is_the_same_text_and_the_others_are_the_data(self):
        model, tokenizer = tiny.model(), tiny.tokenizer()
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": " ".join(["the", "old", "bridge"] * 40)}]}])
        plain, own = probing.probe_rows(model, tokenizer), probing.probe_rows(model, tokenizer, data)
        assert plain.shape == own.shape == (probing.ROWS, probing.TOKENS)
        np.testing.assert_array_equal(plain[0], own[0])
        assert (plain[1:] != own[1:]).any()
        assert "user" not in tokenizer.decode(own[1])

    def test_a_stream_is_not_read(self):
        stream = Dataset.from_list([{"prompt": "x"}]).to_iterable_dataset()
        model, tokenizer = tiny.model(), tiny.tokenizer()
        np.testing.assert_array_equal(
            probing.probe_rows(model, tokenizer, stream), probing.probe_rows(model, tokenizer)
        )

    def test_without_a_tokenizer_the_model_writes_them(self):
        model = tiny.model()
        state = torch.get_rng_state()
        rows = probing.probe_rows(model)
        assert rows.shape == (probing.ROWS, probing.TOKENS)
        np.testing.assert_array_equal(rows, probing.probe_rows(model))
        assert torch.equal(torch.get_rng_state(), state)

    def test_weights_that_are_not_there_cannot_be_asked(self):
        with torch.device("meta"):
            model = type(tiny.model())(tiny.model().config)
        assert probing.probe_rows(model) is None
        assert not probing.runs_alone(model)


class TestOrdinaryLogProbs:
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_against_float64(self, temperature):
        model, rows = tiny.model(), probing.probe_rows(tiny.model(), tiny.tokenizer())
        ids = torch.from_numpy(rows)
        with torch.no_grad():
            logits = model.double()(input_ids=ids).logits[:, :-1] / temperature
        expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found = probing.ordinary_log_probs(tiny.model(), rows, temperature)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)

    def test_leaves_modes_alone(self):
        model = tiny.model().train()
        model.model.norm.eval()
        probing.ordinary_log_probs(model, probing.probe_rows(model), 1.0)
        assert model.training
        assert not model.model.norm.training


class TestWeights:
    def test_any_bit_counts(self):
        model = tiny.model()
        before = mark_weights(model.state_dict().items())
        assert changed_weights(before, model.state_dict().items()) == ([], True)
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nextafter(model.model.norm.weight[3], torch.tensor(9.0))
        assert changed_weights(before, model.state_dict().items())[0] == ["model.norm.weight"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
    def test_scaling_is_no_rounding(self, dtype):
        tensor = torch.arange(1, 20001).remainder(50).to(dtype).reshape(100, 200)
        before = mark_weights([("w", tensor)])
        assert changed_weights(before, [("w", tensor.clone())]) == ([], True)
        changed = tensor * 2 if dtype == torch.int8 else (tensor.double() * 1.01).to(dtype)
        assert changed_weights(before, [("w", changed)]) == (["w"], False)

    def test_merging_and_taking_out_again_is(self):
        generator = torch.Generator().manual_seed(0)
        weight, delta = torch.randn(300, 300, generator=generator), torch.randn(300, 300, generator=generator)
        before = mark_weights([("w", weight)])
        assert changed_weights(before, [("w", (weight + delta) - delta)]) == (["w"], True)

    def test_rows_that_change_places_are_seen(self):
        tensor = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
        before = mark_weights([("w", tensor)])
        assert changed_weights(before, [("w", tensor.flip(1))])[0] == ["w"]

    def test_placing_may_cast_and_divide(self):
        tensor = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
        before = mark_weights([("w", tensor)])
        for placed in (tensor.double(), tensor[:5]):
            assert changed_weights(before, [("w", placed)], placed=True) == ([], True)
            assert changed_weights(before, [("w", placed)]) == (["w"], False)
        assert changed_weights(before, []) == (["w"], False)

    def test_shared(self):
        model = tiny.model()
        other = tiny.model(seed=1)
        assert shared_weights(model, other) == []
        other.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.data)
        assert shared_weights(model, other) == ["model.norm.weight"]


class TestWhenItIsAsked:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
    def test_changes_no_bit_of_training(self, kind, peft, tmp_path):
        runs = [
            train(
                kind,
                tmp_path,
                tiny.saved(tmp_path),
                args={"ref_check": check, **SAVING},
                peft_config=lora() if peft else None,
            )
            for check in ("error", "off")
        ]
        assert_same(*runs)

    def test_not_in_a_step(self, tmp_path):
        calls = []

        class Counting(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                calls.append(Asked.probes)

        class Asked(ReferenceProvider):
            capabilities = Capabilities(temperature=True)
            probes = 0

            def identity(self):
                return ReferenceIdentity("asked", "00")

            def log_probs(self, batch):
                return torch.where(batch.labels[:, 1:] != -100, -1.0, 0.0)

            def probe(self, batch):
                Asked.probes += 1
                return self.log_probs(batch)

        args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=args, reference=Asked(), callbacks=[Counting()])
        assert Asked.probes == 1
        trainer.train()
        # As training begins, after steps 2 and 4, at the last step's checkpoint and at the end.
        assert calls == [2, 2, 3, 3, 4]
        assert Asked.probes in (5, 6)

    def test_checkpoints_keep_it(self, tmp_path):
        train("dpo", tmp_path, tiny.saved(tmp_path), args={**SAVING, "max_steps": 1})
        record = json.loads((tmp_path / "checkpoint-1" / "refplug" / "reference.json").read_text())
        (said,) = record["probe"]
        found = probing.Probe.from_dict(said)
        assert found.rows.shape == (probing.ROWS, probing.TOKENS)
        expected = probing.ordinary_log_probs(tiny.model(), found.rows, 1.0)
        torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=1e-5)


class TestWhatItSays:
    def test_since_when(self, tmp_path):
        trainer = harmed(tmp_path, scale_base, {}, peft_config=lora())
        with pytest.raises(ReferenceMismatchError) as caught:
            trainer.train()
        message = str(caught.value)
        assert "at the checkpoint of step 1" in message  # the last moment at which it held
        assert "at the checkpoint of step 2" in message
        assert "Likely causes" in message
        assert not (tmp_path / "checkpoint-2").exists()

    def test_names_the_weights(self, tmp_path):
        def write_one(trainer):
            trainer.model.get_base_model().model.layers[0].mlp.down_proj.weight[0, 0] += 1e-4

        trainer = harmed(tmp_path, write_one, {}, peft_config=lora())
        with pytest.raises(ReferenceMismatchError, match=r"1 weights.*model\.layers\.0\.mlp\.down_proj\.weight"):
            trainer.train()

    def test_without_checkpoints_at_the_end(self, tmp_path):
        trainer = harmed(tmp_path, scale_base, {"save_strategy": "no"}, peft_config=lora())
        with pytest.raises(ReferenceMismatchError, match=r"at the end of training, after step 3.*as training began"):
            trainer.train()

    def test_warn_goes_on(self, tmp_path, caplog):
        harmed(tmp_path, scale_base, {"ref_check": "warn"}, peft_config=lora()).train()
        assert "is not the one that was declared" in caplog.text or "are declared not to move" in caplog.text

    def test_off_says_nothing(self, tmp_path, caplog):
        trainer = harmed(tmp_path, scale_base, {"ref_check": "off"}, peft_config=lora())
        trainer.train()
        assert "declared" not in caplog.text
        record = json.loads((tmp_path / "checkpoint-1" / "refplug" / "reference.json").read_text())
        assert record["probe"] == [None]

    def test_bfloat16_is_no_excuse(self, tmp_path):
        def scale(trainer):
            trainer.model.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(1.05)

        policy = tiny.model().to(torch.bfloat16)
        harm = Harm(scale)
        trainer = build("dpo", tmp_path, policy, args=SAVING, peft_config=lora(), callbacks=[harm])
        next(each for each in trainer.callback_handler.callbacks if isinstance(each, Harm)).trainer = trainer
        with pytest.raises(ReferenceMismatchError):
            trainer.train()
        assert trainer.state.global_step <= 2
