"""With `average="bema"`, `ema` makes the reference that TRL's `BEMACallback` makes, and keeps it in checkpoints."""

import pytest
import torch
from peft import LoraConfig
from trl.experimental.bema_for_ref_model import BEMACallback, DPOTrainer

from trl_refplug import ConfigurationError, OptionsError, ReferenceMismatchError
from trl_refplug.provider import STATE_DIRECTORY
from trl_refplug.providers.ema.export import export_reference
from trl_refplug.providers.ema.tensor_files import TensorReader

from .. import tiny
from .runs import ONLINE, assert_same, build, train


SCHEDULES = {
    "every step": {"update_freq": 1, "ref_model_update_freq": 1},
    "every second": {"update_freq": 2, "ref_model_update_freq": 2},
    "starts later": {"update_freq": 1, "update_after": 2, "ref_model_update_freq": 1},
    "moves between updates": {"update_freq": 2, "update_after": 1, "ref_model_update_freq": 3},
    "moves later": {"update_freq": 2, "ref_model_update_freq": 2, "ref_model_update_after": 3},
    "other powers": {
        "update_freq": 1,
        "ref_model_update_freq": 2,
        "ema_power": 0.8,
        "bias_power": 0.4,
        "lag": 3,
        "multiplier": 0.5,
        "min_ema_multiplier": 0.3,
    },
}
STEPS = {"max_steps": 7}


def bema(**options):
    return {"ref_provider": "ema", "ref_provider_kwargs": {"average": "bema", **options}, **STEPS}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def losses(trainer):
    return [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def references(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.ref_model.named_parameters()}


class TestEqualsTrl:
    def compare(self, tmp_path, model, schedule, **kwargs):
        theirs = train(
            "dpo",
            tmp_path / "trl",
            model,
            cls=DPOTrainer,
            args=STEPS,
            callbacks=[BEMACallback(**schedule, update_ref_model=True)],
            **kwargs,
        )
        ours = train("dpo", tmp_path / "ours", model, args=bema(**schedule), **kwargs)
        assert_same(ours, theirs)
        expected = references(theirs.trainer)
        assert all(torch.equal(expected[name], value) for name, value in references(ours.trainer).items())
        return ours.trainer

    @pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))
    def test_schedules(self, schedule, tmp_path):
        trainer = self.compare(tmp_path, tiny.saved(tmp_path), schedule)
        every, after = schedule["ref_model_update_freq"], schedule.get("ref_model_update_after", 0)
        moves = [step >= after and (step - after) % every == 0 for step in range(1, 8)]
        assert trainer.ref_model.provider.metadata()["syncs"] == sum(moves)
        start = dict(tiny.model().named_parameters())
        assert any(not torch.equal(start[name], value) for name, value in references(trainer).items())

    def test_tied_weights(self, tmp_path):
        self.compare(tmp_path, tiny.saved(tmp_path, tie_word_embeddings=True), SCHEDULES["every second"])

    def test_passed_reference(self, tmp_path):
        """A model that is passed is the reference until the reference becomes the average of the policy."""
        self.compare(tmp_path, tiny.saved(tmp_path), SCHEDULES["moves later"], ref_model=tiny.model(seed=1))

    def test_defaults(self):
        """Without options, the average is that of a callback without arguments."""
        from trl_refplug.providers.options import EmaOptions

        callback, options = BEMACallback(), EmaOptions(average="bema")
        names = [*SCHEDULES["other powers"], "update_after", "ref_model_update_after"]
        assert len(names) == 9
        assert all(getattr(options, name) == getattr(callback, name) for name in names)


@pytest.mark.parametrize("kind", [*ONLINE, "kto"])
def test_other_trainers(kind, tmp_path):
    """The average does not depend on the trainer."""
    averages = {}
    for power in (0.0, 0.5):
        run = train(
            kind, tmp_path, tiny.saved(tmp_path), args=bema(update_freq=1, ref_model_update_freq=1, ema_power=power)
        )
        averages[power] = logged(run.trainer, "ref/distance")
        assert logged(run.trainer, "ref/average_step") == [1, 2, 3, 4, 5, 6, 7]
    assert averages[0.0] != averages[0.5]


def test_bfloat16_is_averaged_in_float32(tmp_path):
    """TRL would keep the average in bfloat16."""
    args = {**bema(update_freq=1, ref_model_update_freq=1), "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    seen = []

    class Watching(DPOTrainer):
        def training_step(self, *args, **kwargs):
            seen.append({name: p.detach().double() for name, p in self.model.named_parameters()})
            return super().training_step(*args, **kwargs)

    from trl_refplug import plug

    run = train("dpo", tmp_path, tiny.saved(tmp_path), cls=plug(Watching), args=args)
    seen.append({name: p.detach().double() for name, p in run.trainer.model.named_parameters()})
    ema = dict(seen[0])
    for step, policy in enumerate(seen[1:], start=1):
        beta = (10 + step) ** -0.5
        ema = {name: (1 - beta) * ema[name] + beta * value for name, value in policy.items()}
    alpha = (10 + STEPS["max_steps"]) ** -0.2
    for name, reference in references(run.trainer).items():
        expected = (ema[name] + alpha * (seen[-1][name] - seen[0][name])).float()
        assert reference.dtype == torch.bfloat16
        difference = (reference.float() - expected).abs()
        assert bool((difference <= expected.abs() * 2**-8 + 1e-7).all())  # the difference is one rounding


class TestCheckpoints:
    ARGS = {"save_strategy": "steps", "save_steps": 1}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("schedule", ["starts later", "moves between updates"])
    def test_resumed(self, schedule, dtype, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        args = {**bema(**SCHEDULES[schedule]), "bf16": dtype == "bfloat16", "model_init_kwargs": {"dtype": dtype}}
        whole = train("dpo", out, path, args={**args, **self.ARGS}).trainer
        for step in (1, 2, 4):
            trainer = build("dpo", tmp_path / "again", path, args=args)
            trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
            assert losses(trainer) == losses(whole)
            expected = references(whole)
            assert all(torch.equal(value, expected[name]) for name, value in references(trainer).items())
            assert trainer.ref_model.provider.metadata() == whole.ref_model.provider.metadata()

    @pytest.mark.parametrize("lost", ["start", "ema", "corrected"])
    def test_every_part_of_the_state_is_needed(self, lost, tmp_path, monkeypatch):
        """The test above would fail if one of the three tensors were not loaded."""
        from trl_refplug.providers.ema import bias_corrected

        path, out = tiny.saved(tmp_path), tmp_path / "out"
        args = bema(**SCHEDULES["moves between updates"])
        whole = train("dpo", out, path, args={**args, **self.ARGS}).trainer
        saved_as = bias_corrected._Kept.tensors
        monkeypatch.setattr(
            bias_corrected._Kept,
            "tensors",
            lambda kept, name: {key: value for key, value in saved_as(kept, name).items() if f".{lost}/" not in key},
        )
        trainer = build("dpo", tmp_path / "again", path, args=args)
        # After step 5 the average was updated last, and in step 6 the reference becomes what it was then.
        trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{5 if lost == 'corrected' else 4}"))
        assert losses(trainer) != losses(whole)

    def test_trained_again(self, tmp_path):
        """A second `train()` counts its steps anew, and so does the average."""
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=bema(update_freq=3, ref_model_update_freq=3))
        trainer.train()
        provider = trainer.ref_model.provider
        moved = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        provider.on_train_begin()
        kept = provider._moving._kept
        assert all(torch.equal(kept[name].start, value) for name, value in moved.items())
        assert all(torch.equal(kept[name].ema, value) for name, value in moved.items())

    def test_another_schedule_is_refused(self, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        train("dpo", out, path, args={**bema(), **self.ARGS, "max_steps": 1})
        trainer = build("dpo", tmp_path, path, args=bema(bias_power=0.3))
        with pytest.raises(ReferenceMismatchError, match=r"bias_power=0\.2.*bias_power=0\.3"):
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-1"))

    def test_checkpoint_of_the_other_average_is_refused(self, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        train("dpo", out, path, args={"ref_provider": "ema", **self.ARGS, "max_steps": 1})
        trainer = build("dpo", tmp_path, path, args=bema())
        with pytest.raises(ReferenceMismatchError, match=r"alpha=0\.6.*average=bema"):
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-1"))

    def test_exported(self, tmp_path):
        from transformers import AutoModelForCausalLM

        path, out = tiny.saved(tmp_path), tmp_path / "out"
        args = {**bema(update_freq=1, ref_model_update_freq=1), **self.ARGS}
        trainer = train("dpo", out, path, args=args).trainer
        assert export_reference(out / "checkpoint-7", tmp_path / "exported") == "model"
        exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
        assert all(torch.equal(exported[name], value) for name, value in references(trainer).items())
        with TensorReader(out / "checkpoint-7" / STATE_DIRECTORY) as reader:
            assert {"bema.start/lm_head.weight", "bema.ema/lm_head.weight"} < set(reader.names)


class TestRefused:
    @pytest.mark.parametrize("kwargs", [{"peft_config": LoraConfig(r=4, target_modules="all-linear")}])
    def test_peft(self, kwargs, tmp_path):
        with pytest.raises(ConfigurationError, match=r"average='bema'.*PEFT.*average='exact'"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=bema(), **kwargs)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (bema(alpha=0.5), r"alpha=0\.5 .*`ref_model_mixup_alpha`.* for average='exact' or 'factors'"),
            (bema(start_step=3), r"start_step=3 is for"),
            (bema(tolerance=1e-3), r"tolerance=0\.001 is for average='exact', and average='bema'"),
            ({**bema(), "ref_model_sync_steps": 3, "sync_ref_model": True}, "flag `ref_model_sync_steps`"),
            (
                {"ref_provider": "ema", "ref_provider_kwargs": {"update_freq": 2}},
                r"update_freq=2 is for average='bema', and average='exact'",
            ),
            (
                {"ref_provider": "ema", "ref_provider_kwargs": {"average": "factors", "max_rank": 2}},
                r"max_rank=2 is for average='exact', and average='factors'",
            ),
            (bema(update_freq=0), "update_freq must be at least 1"),
            (bema(ref_model_update_freq=0), "ref_model_update_freq must be at least 1"),
            (bema(update_after=-1), "update_after must be at least 0"),
            (bema(ema_power=-0.5), "ema_power must be at least 0"),
            (bema(min_ema_multiplier=1.5), "min_ema_multiplier must be from 0 to 1"),
            (bema(lag=0, multiplier=0.0), r"step 400, and it is 0\.0 there.*Raise lag"),
            (bema(updates=3), "Did you mean 'update_"),
        ],
        ids=str,
    )
    def test_options(self, args, message, tmp_path):
        with pytest.raises(OptionsError, match=message):
            build("dpo", tmp_path, str(tmp_path / "no-such-model"), args=args)
