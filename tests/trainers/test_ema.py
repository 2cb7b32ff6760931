"""With `ema` the reference follows the policy, in full fine-tuning exactly as with TRL's callback."""

import math
from contextlib import nullcontext

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from peft import LoraConfig

from trl_refplug import ConfigurationError, OptionsError, plug
from trl_refplug.providers.ema.provider import EmaOptions, EmaProvider

from .. import tiny
from .runs import KINDS, ONLINE, TRL, assert_same, build, train


SYNCING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2, "max_steps": 5}


def ema(alpha=0.3, sync_steps=2, **options):
    return {
        "ref_provider": "ema",
        "ref_provider_kwargs": {"alpha": alpha, "sync_steps": sync_steps, **options},
        "max_steps": 5,
    }


def logged(run, name):
    return [entry[name] for entry in run.trainer.state.log_history if name in entry]


def options_of(trainer):
    return trainer.ref_model.provider.options


@pytest.mark.parametrize("kind", KINDS)
class TestEqualsTrl:
    def compare(self, kind, tmp_path, model, **kwargs):
        theirs = train(kind, tmp_path / "trl", model, ours=False, args=SYNCING, **kwargs)
        ours = train(kind, tmp_path / "ours", model, args=SYNCING, **kwargs)
        assert type(ours.trainer.ref_model.provider).__name__ == "EmaProvider"
        assert_same(ours, theirs)
        references = dict(theirs.trainer.ref_model.named_parameters())
        ours_references = dict(ours.trainer.ref_model.named_parameters())
        assert all(torch.equal(ours_references[name], value) for name, value in references.items())
        assert logged(ours, "ref/syncs") == [0, 1, 1, 2, 2]

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
    def test_flags_of_trl(self, kind, architecture, tmp_path):
        self.compare(kind, tmp_path, tiny.saved(tmp_path, architecture))

    def test_tied_weights(self, kind, tmp_path):
        self.compare(kind, tmp_path, tiny.saved(tmp_path, tie_word_embeddings=True))

    def test_it_is_not_the_frozen_reference(self, kind, tmp_path):
        path = tiny.saved(tmp_path)
        moving = train(kind, tmp_path, path, args=ema(alpha=0.9))
        frozen = train(kind, tmp_path, path, args={"ref_provider": "frozen", "max_steps": 5})
        assert moving.logs[1]["grad_norm"] == frozen.logs[1]["grad_norm"]  # until the first sync
        assert moving.logs[2]["grad_norm"] != frozen.logs[2]["grad_norm"]

    def test_alpha_zero_is_frozen(self, kind, tmp_path):
        path = tiny.saved(tmp_path)
        still = train(kind, tmp_path, path, args=ema(alpha=0, sync_steps=1))
        assert_same(still, train(kind, tmp_path, path, args={"ref_provider": "frozen", "max_steps": 5}))

    def test_start_step(self, kind, tmp_path):
        run = train(kind, tmp_path, tiny.saved(tmp_path), args=ema(sync_steps=2, start_step=3))
        assert logged(run, "ref/syncs") == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_alpha_one_every_step_has_no_log_ratio(kind, tmp_path):
    class Watching(TRL[kind]):
        seen = []

        def _compute_loss(self, model, inputs, return_outputs):
            loss = super()._compute_loss(model, inputs, return_outputs)
            self.seen.append([self._metrics["train"][key][-1] for key in ("rewards/chosen", "rewards/rejected")])
            return loss

    run = train(kind, tmp_path, tiny.saved(tmp_path), cls=plug(Watching), args=ema(alpha=1, sync_steps=1))
    assert len(run.logs) == 5
    if kind == "dpo":
        assert run.trainer.seen == [[0.0, 0.0]] * 5
        assert logged(run, "loss") == pytest.approx([math.log(2)] * 5, abs=1e-7)
    else:
        assert all(entry["rewards/chosen"] == 0 and entry["rewards/rejected"] == 0 for entry in run.logs)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_packed_scoring_follows_the_reference(peft, tmp_path):
    """A packed scorer keeps nothing from step to step that depends on the weights."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    losses = {}
    for alpha in (0, 1):
        args = ema(alpha=alpha, sync_steps=1, scoring="packed")
        run = train("dpo", tmp_path, tiny.saved(tmp_path), args=args, peft_config=peft_config)
        losses[alpha] = logged(run, "loss")
    assert losses[1] == pytest.approx([math.log(2)] * 5, abs=1e-4)
    assert min(losses[0]) < math.log(2) - 1e-2  # a reference that never moves gives other losses


def test_fsdp1_is_refused(tmp_path, monkeypatch):
    """Accelerate selects FSDP only where there is an accelerator, so the test writes FSDP into its state."""
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=ema())
    state = trainer.accelerator.state
    monkeypatch.setitem(state.__dict__, "distributed_type", DistributedType.FSDP)
    for version, refused in ((1, True), (2, False)):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
        monkeypatch.setitem(state.__dict__, "fsdp_plugin", plugin)
        provider = EmaProvider(EmaOptions())
        context = trainer.ref_model.provider._context
        context.reference_model = trainer.ref_model.provider.module
        with pytest.raises(ConfigurationError, match="fsdp_version: 2") if refused else nullcontext():
            provider.setup(context)


class TestOptions:
    def test_kwargs_win_over_flags(self, tmp_path):
        args = {**SYNCING, "ref_provider_kwargs": {"alpha": 0.7}}
        options = options_of(build("dpo", tmp_path, tiny.saved(tmp_path), args=args))
        assert (options.alpha, options.sync_steps) == (0.7, 2)

    def test_by_name_alone(self, tmp_path):
        options = options_of(build("grpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": "ema"}))
        assert (options.alpha, options.sync_steps, options.start_step) == (0.6, 512, 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 1.5}, "from 0 to 1"),
            ({"sync_steps": 0}, "at least 1"),
            ({"start_step": -1}, "at least 0"),
            ({"alfa": 0.1}, "Did you mean 'alpha'"),
            ({"master_dtype": "fp32"}, "float32"),
        ],
    )
    def test_wrong(self, options, message, tmp_path):
        args = {"ref_provider": "ema", "ref_provider_kwargs": options}
        with pytest.raises(OptionsError, match=message):
            build("dpo", tmp_path, str(tmp_path / "no-such-model"), args=args)

    @pytest.mark.parametrize("device", ["same", "cpu"])
    def test_bfloat16_policy(self, device, tmp_path):
        args = {**ema(alpha=0.001, sync_steps=1, master_device=device), "bf16": True, "max_steps": 3}
        args["model_init_kwargs"] = {"dtype": "bfloat16"}
        run = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        provider = run.trainer.ref_model.provider
        (directory := tmp_path / "state").mkdir()
        provider.save_state(directory)
        from trl_refplug.providers.ema.tensor_files import TensorReader

        with TensorReader(directory) as reader:
            average = reader.whole("lm_head.weight", (380, 32))
            assert reader.dtypes["lm_head.weight"] == torch.bfloat16
        scoring = dict(run.trainer.ref_model.named_parameters())["lm_head.weight"]
        assert (average.dtype, scoring.dtype) == (torch.float32, torch.bfloat16)
        assert not torch.equal(average, scoring.float())  # it has moved by less than bfloat16 can show
        assert torch.equal(average.bfloat16(), scoring)


class TestPassedReference:
    """With `sync_ref_model=True`, the average starts at what is passed as `ref_model=`."""

    @pytest.mark.parametrize("kind", ["dpo", "kto"])
    def test_equals_trl(self, kind, tmp_path):
        model = tiny.model(seed=1)
        theirs = train(kind, tmp_path, tiny.saved(tmp_path), ours=False, args=SYNCING, ref_model=model)
        ours = train(kind, tmp_path, tiny.saved(tmp_path), args=SYNCING, ref_model=model)
        assert_same(ours, theirs)
        assert logged(ours, "ref/syncs")[-1] == 2

    @pytest.mark.parametrize("kind", ONLINE)
    def test_where_trl_takes_none(self, kind, tmp_path):
        run = train(kind, tmp_path, tiny.saved(tmp_path), args=SYNCING, ref_model=tiny.model(seed=1))
        assert run.logs[0]["kl"] > 0.01
        assert logged(run, "ref/syncs")[-1] == 2

    def test_of_another_shape(self, tmp_path):
        with pytest.raises(ConfigurationError, match="gate_proj"):
            build(
                "dpo", tmp_path, tiny.saved(tmp_path), args=SYNCING, ref_model=tiny.model(seed=1, intermediate_size=64)
            )


class TestMetrics:
    @pytest.mark.parametrize("kind", KINDS)
    def test_logged(self, kind, tmp_path):
        run = train(kind, tmp_path, tiny.saved(tmp_path), args=ema(alpha=1, sync_steps=2))
        distances, ratios = logged(run, "ref/distance"), logged(run, "ref/log_ratio")
        assert len(distances) == len(ratios) == 5
        assert [distance == 0 for distance in distances] == [False, True, False, True, False]
        assert all(math.isfinite(ratio) for ratio in ratios)
        assert ratios[0] != 0

    def test_log_ratio_is_that_of_the_batch(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={**ema(), "max_steps": 1})
        seen = []
        scored = trainer.ref_model.provider.log_probs

        def remember(batch):
            seen.append((batch, scored(batch).clone()))
            return seen[-1][1].clone()

        trainer.ref_model.provider.log_probs = remember
        trainer.train()
        batch, reference = seen[-1]
        with torch.no_grad():
            logits = trainer.model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        labels = batch.labels[:, 1:]
        policy = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        expected = (policy - reference)[labels != -100].mean().item()
        assert trainer.state.log_history[0]["ref/log_ratio"] == pytest.approx(expected, abs=1e-5)

    def test_measuring_changes_nothing(self, tmp_path):
        path = tiny.saved(tmp_path, attention_dropout=0.2)
        args = {**ema(), "disable_dropout": False}
        often = train("grpo", tmp_path, path, args={**args, "logging_steps": 1})
        never = train("grpo", tmp_path, path, args={**args, "logging_steps": 100})
        assert all(torch.equal(weight, never.weights[name]) for name, weight in often.weights.items())
