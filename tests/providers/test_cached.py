"""`cached`: values are never stale, no row is scored twice, and training is the same as without it."""

import math
import shutil
from contextlib import nullcontext
from itertools import count

import pyarrow as pa
import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_refplug import (
    ConfigurationError,
    MissingRowError,
    ReferenceMismatchError,
    StoreError,
    UnsupportedInputError,
)
from trl_refplug.scoring import scorer
from trl_refplug.store import LogProbStore, summarize
from trl_refplug.testing.samples import image_preference_data, tiny_image_policy, tiny_image_processor

from .. import tiny
from ..trainers.runs import DATA, assert_same, build, finished, train


OFFLINE = ["dpo", "kto"]


def lora(**overrides):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **overrides})


def gpt2_lora():
    return lora(target_modules=["c_attn"], fan_in_fan_out=True)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def use(store):
    """The arguments of a run that uses the store of the test."""

    def arguments(fill="ahead", options=None, **args):
        return {
            "ref_provider": "cached",
            "ref_provider_kwargs": {"path": str(store), "fill": fill, **(options or {})},
            **args,
        }

    return arguments


def assert_close(ours, theirs, tolerance=1e-4):
    """
    Two runs are the same but for rounding: of sums of about ten float32 log-probs, after a few steps of training.
    """
    assert len(ours.logs) == len(theirs.logs) > 0
    for our, their in zip(ours.logs, theirs.logs, strict=True):
        assert our.keys() == their.keys()
        for name, value in their.items():
            if "accuracies" not in name:  # if two rewards are equal, rounding decides which one is larger
                assert our[name] == pytest.approx(value, abs=tolerance, rel=1e-3), name


class TestSameTraining:
    @pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
    @pytest.mark.parametrize("kind", OFFLINE)
    def test_filled_ahead_as_frozen(self, kind, peft, tmp_path, use):
        path = tiny.saved(tmp_path)
        given = {"peft_config": lora() if peft else None, "eval_dataset": DATA[kind](6)}
        evaluating = {"eval_strategy": "steps", "eval_steps": 2}
        state = {}
        for provider in ("frozen", "cached"):
            args = {"ref_provider": "frozen"} if provider == "frozen" else use()
            state[provider] = train(kind, tmp_path, path, args={**args, **evaluating}, **given), torch.get_rng_state()
        (frozen, frozen_rng), (cached, cached_rng) = state.values()
        assert_close(cached, frozen)
        assert any("eval_loss" in entry for entry in cached.logs)
        assert torch.equal(frozen_rng, cached_rng)
        again = train(kind, tmp_path, path, args={**use("never"), **evaluating}, **given)
        assert_same(again, cached)

    @pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2", "mixtral"])
    def test_architectures(self, architecture, tmp_path, use):
        path = tiny.saved(tmp_path, architecture)
        cached = train("dpo", tmp_path, path, args=use())
        assert cached.logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert_close(cached, train("dpo", tmp_path, path, args={"ref_provider": "frozen"}))

    def test_mixed_precision_bit_for_bit(self, tmp_path, use):
        """
        Rows are scored with the policy before accelerate has prepared it, and it computes as the prepared one does.
        Rows that are longer than the sliding window are scored exactly; here they are all in one batch, of the same
        shape as the trainer's.
        """
        path = tiny.saved(tmp_path, "gemma2", sliding_window=2)
        given = {"train_dataset": DATA["dpo"](4)}
        frozen = train("dpo", tmp_path, path, args={"ref_provider": "frozen", "bf16": True}, **given)
        with pytest.warns(UserWarning, match="sliding window"):
            cached = train("dpo", tmp_path, path, args=use(bf16=True), **given)
        assert_same(cached, frozen)

    @pytest.mark.parametrize("source", ["policy", "frozen"])
    @pytest.mark.parametrize("kind", OFFLINE)
    def test_lazy_bit_for_bit_in_the_first_epoch(self, kind, source, tmp_path, use):
        path = tiny.saved(tmp_path)
        peft_config = lora() if source == "policy" else None
        options = {} if source == "policy" else {"source": "frozen"}
        plain = {"ref_provider": "adapter" if source == "policy" else "frozen"}
        online = train(kind, tmp_path, path, args=plain, peft_config=peft_config)
        lazy = train(kind, tmp_path, path, args=use("lazy", options), peft_config=peft_config)
        if kind == "dpo":
            assert_same(lazy, online)
        else:  # some of KTO's KL rows are also in other batches, with other shapes
            assert_close(lazy, online)
        counters = lazy.trainer.ref_model.provider.counters()
        assert counters["misses"] > 0
        again = train(kind, tmp_path, path, args=use("lazy", options), peft_config=peft_config)
        assert_same(again, lazy)
        assert again.trainer.ref_model.provider.counters()["misses"] == 0

    def test_lazy_reads_what_was_filled_ahead(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        ahead = train("dpo", tmp_path, path, args=use(), peft_config=lora())
        lazy = train("dpo", tmp_path, path, args=use("lazy"), peft_config=lora())
        assert_same(lazy, ahead)
        assert lazy.trainer.ref_model.provider.counters() == {"hits": 24, "misses": 0}

    def test_later_epochs_are_free(self, tmp_path, use):
        run = train("dpo", tmp_path, tiny.saved(tmp_path), args=use("lazy", max_steps=9), peft_config=lora())
        assert run.trainer.ref_model.provider.counters() == {"hits": 48, "misses": 24}

    def test_stream(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        given = {"train_dataset": DATA["dpo"]().to_iterable_dataset(), "peft_config": lora()}
        with pytest.raises(ConfigurationError, match="fill='lazy'"):
            build("dpo", tmp_path, path, args=use(), **given)
        lazy = train("dpo", tmp_path, path, args=use("lazy"), **given)
        assert_same(lazy, train("dpo", tmp_path, path, args={"ref_provider": "adapter"}, **given))

    def test_no_second_model(self, tmp_path, use):
        model = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path)).train()
        trainer = build("dpo", tmp_path, model, args=use())
        assert list(trainer.ref_model.parameters()) == []
        assert all(module.training for module in trainer.model.modules())
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())

    def test_metrics_and_checkpoint(self, tmp_path, use, store):
        import json

        args = use(save_strategy="steps", save_steps=3)
        run = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        steps = [entry for entry in run.trainer.state.log_history if "loss" in entry]
        assert [entry["ref/hits"] for entry in steps] == [8, 16, 24]
        record = json.loads((tmp_path / "checkpoint-3" / "refplug" / "reference.json").read_text())
        assert record["metadata"] == {"path": str(store), "rows": 24}
        assert record["identity"]["parts"][0]["provider"] == "policy"


class TestHits:
    """
    Rows are found however they are batched, shuffled or reduced: with fill='never', a missing row would be an error.
    """

    @pytest.mark.parametrize(
        "args",
        [
            {"ld_alpha": 0.5},
            {"loss_type": ["ipo"]},
            {"learning_rate": 1e-5},
            {"per_device_train_batch_size": 3},
            {"seed": 7},
            {"beta": 0.5},
            {"disable_dropout": False},
            {"max_length": 200},
            {"gradient_checkpointing": True},
        ],
        ids=str,
    )
    def test_other_flags(self, args, tmp_path, use):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        run = train("dpo", tmp_path / "elsewhere", path, args=use("never", **args))
        assert run.trainer.ref_model.provider.counters()["misses"] == 0
        assert_close(run, train("dpo", tmp_path, path, args={"ref_provider": "frozen", **args}))

    def test_other_adapters(self, tmp_path, use):
        """The base model is what is scored: rows of full fine-tuning are found by LoRA with any rank and seed."""
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        for rank, seed in ((4, 1), (8, 2)):
            build("dpo", tmp_path, path, args=use("never", seed=seed), peft_config=lora(r=rank))

    def test_other_order_and_fewer_rows(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        data = DATA["dpo"]()
        for other in (data.shuffle(seed=3), data.select(range(5)), concatenate_datasets([data, data])):
            build("dpo", tmp_path, path, args=use("never"), train_dataset=other)

    def test_only_appended_rows_are_scored(self, tmp_path, use, store):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use(), train_dataset=DATA["dpo"](8))
        before = summarize(store).rows
        build("dpo", tmp_path, path, args=use(), train_dataset=DATA["dpo"](12))
        assert (before, summarize(store).rows) == (16, 24)

    def test_rows_of_another_trainer(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        build("kto", tmp_path, path, args=use("never", loss_type="apo_zero_unpaired"))

    def test_a_copy_of_the_model(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        model = AutoModelForCausalLM.from_pretrained(path)
        model.save_pretrained(tmp_path / "copy")
        build("dpo", tmp_path, str(tmp_path / "copy"), args=use("never"))
        build("dpo", tmp_path, model, args=use("never"))
        named = {"source": "frozen", "source_kwargs": {"model": path}}
        build("dpo", tmp_path, path, args=use("never", named))


class TestMisses:
    """
    If something changes that decides a value, it is scored again, and is right. TRL's own cache is stale in these
    cases.
    """

    @pytest.mark.parametrize(
        "change",
        [
            {"args": {"max_length": 9}},
            {"args": {"max_length": 9, "truncation_mode": "keep_end"}},
            {"args": {"bf16": True}},
            {"args": {"model_init_kwargs": {"dtype": "bfloat16"}}},
            {"args": {"model_init_kwargs": {"attn_implementation": "eager"}}},
            {"model": {"seed": 1}},
            {"model": {"tie_word_embeddings": True}},
            {"model": {"rope_theta": 500.0}},
        ],
        ids=str,
    )
    def test_changed(self, change, tmp_path, use):
        build("dpo", tmp_path, tiny.saved(tmp_path), args=use())
        path = tiny.saved(tmp_path / "other", **change["model"]) if "model" in change else tiny.saved(tmp_path)
        args = change.get("args", {})
        with pytest.raises(MissingRowError, match="of the 24 rows"):
            build("dpo", tmp_path, path, args=use("never", **args))
        run = train("dpo", tmp_path, path, args=use(**args))
        assert run.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-2 if "bf" in str(args) else 1e-5)

    def test_chat_template(self, tmp_path, use):
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in DATA["dpo"]()
        ]
        given = {"train_dataset": Dataset.from_list(rows)}
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use(), **given)
        build("dpo", tmp_path, path, args=use("never"), **given)
        template = tiny.CHAT_TEMPLATE.replace("<|end|>", "<|end|><eos>")
        tokenizer = tiny.tokenizer().__class__.from_pretrained(path)
        tokenizer.chat_template = template
        with pytest.raises(MissingRowError):
            build("dpo", tmp_path, path, args=use("never"), processing_class=tokenizer, **given)

    def test_kl_rows_depend_on_the_batch(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        build("kto", tmp_path, path, args=use())
        build("kto", tmp_path, path, args=use("never"))
        with pytest.raises(MissingRowError):
            build("kto", tmp_path, path, args=use("never", per_device_train_batch_size=3))

    def test_products_rounded_to_tf32(self, tmp_path, use):
        path, matmul = tiny.saved(tmp_path), torch.backends.mkldnn.matmul
        build("dpo", tmp_path, path, args=use())
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            with pytest.raises(MissingRowError):
                build("dpo", tmp_path, path, args=use("never"))
        finally:
            matmul.fp32_precision = before

    def test_edited_policy(self, tmp_path, use):
        model = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path))
        build("dpo", tmp_path, model, args=use())
        with torch.no_grad():
            model.model.norm.weight[0] += 0.5
        with pytest.raises(MissingRowError):
            build("dpo", tmp_path, model, args=use("never"))
        run = train("dpo", tmp_path, model, args=use())
        assert run.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


class TestPadding:
    """With absolute positions a row padded on its left is another row; with rotary ones it is not."""

    @pytest.mark.parametrize(("architecture", "misses"), [("gpt2", 4), ("llama", 2)])
    def test_left_and_right(self, architecture, misses, tmp_path, use):
        path = tiny.saved(tmp_path, architecture)
        peft_config = gpt2_lora() if architecture == "gpt2" else lora()
        trainer = build("dpo", tmp_path, path, args=use("lazy"), peft_config=peft_config)
        online = build("dpo", tmp_path, path, args={"ref_provider": "adapter"}, peft_config=peft_config)
        texts = ["the cat sat on a warm mat", "two plus three is five it is five"]
        for side in ("right", "left"):
            batch = tiny.tokenizer()(texts, return_tensors="pt", padding=True, padding_side=side)
            real = batch["attention_mask"] == 1
            labels = batch["input_ids"].masked_fill(~real, -100)
            labels[:, 0] = -100
            labels[real.cumsum(1) == 1] = -100
            inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
            found = trainer.ref_model(**inputs, fused_lm_head=True).log_probs
            expected = online.ref_model(**inputs, fused_lm_head=True).log_probs
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        # Of the two rows, the longer one has no padding.
        assert trainer.ref_model.provider.counters()["misses"] == misses - (architecture == "gpt2")

    def test_rows_that_are_no_sequences(self, tmp_path, use):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=use(), peft_config=lora())
        ids = torch.arange(10, 16).reshape(2, 3)
        holes = torch.tensor([[1, 0, 1], [1, 1, 1]])
        with pytest.raises(UnsupportedInputError, match="holes"):
            trainer.ref_model(input_ids=ids, attention_mask=holes, labels=ids, fused_lm_head=True)
        with pytest.raises(UnsupportedInputError, match="token at their place"):
            trainer.ref_model(input_ids=ids, labels=ids + 1, fused_lm_head=True)

    def test_rows_that_depend_on_their_batch(self, tmp_path, use):
        """With dynamic scaling the longest row of a batch changes the positions of all."""
        scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        path = tiny.saved(tmp_path, rope_parameters=scaling, max_position_embeddings=10)
        with pytest.raises(UnsupportedInputError, match="longer than 10 tokens"):
            build("dpo", tmp_path, path, args=use())
        build("dpo", tmp_path, path, args=use(max_length=10))

    def test_images(self, tmp_path, use):
        with pytest.raises(UnsupportedInputError, match="pixel_values"):
            build(
                "dpo",
                tmp_path,
                tiny_image_policy(),
                args=use(max_length=None),
                train_dataset=image_preference_data(),
                processing_class=tiny_image_processor(),
            )


class TestAfterTrainingBegan:
    def test_policy_is_not_the_reference_any_more(self, tmp_path, use):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=use())
        other = DATA["dpo"](20).select(range(12, 20))
        trainer.evaluate(other)  # this works, because the policy has not moved yet
        trainer.train()
        trainer.evaluate(other)
        with pytest.raises(MissingRowError, match=r"Row 0 of the batch, which begins '.+', is not .*\"source\""):
            trainer.evaluate(DATA["dpo"](30).select(range(20, 30)))

    @pytest.mark.parametrize("source", ["adapter", "frozen"])
    def test_sources_that_stay(self, source, tmp_path, use):
        path = tiny.saved(tmp_path)
        other = DATA["dpo"](30).select(range(12, 30))
        given = {"peft_config": lora()} if source == "adapter" else {}
        named = {} if source == "adapter" else {"source": "frozen", "source_kwargs": {"model": path}}
        results = []
        for args in ({"ref_provider": source}, use(options=named)):
            trainer = build("dpo", tmp_path, path, args=args, **given)
            trainer.train()
            results.append(trainer.evaluate(other)["eval_loss"])
        assert results[1] == pytest.approx(results[0], abs=1e-4)

    @pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
    def test_policy_cast_for_an_evaluation(self, peft, tmp_path, use):
        peft_config = lora() if peft else None
        other = DATA["dpo"](30).select(range(12, 30))
        path = tiny.saved(tmp_path)
        trainer = build("dpo", tmp_path, path, args={**use(), "bf16_full_eval": True}, peft_config=peft_config)
        rows = len(trainer.ref_model.provider._store)
        with pytest.raises(MissingRowError, match=r"`bf16_full_eval=True` has cast the policy.* to bfloat16"):
            trainer.evaluate(other)
        assert len(trainer.ref_model.provider._store) == rows

    def test_policy_changed_by_hand(self, tmp_path, use):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=use())
        with torch.no_grad():
            trainer.model.model.norm.weight[0] += 1
        with pytest.raises(ReferenceMismatchError, match=r"model\.norm\.weight"):
            trainer.evaluate(DATA["dpo"](30).select(range(12, 30)))

    @pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
    def test_resume(self, peft, tmp_path, use):
        path = tiny.saved(tmp_path)
        peft_config = lora() if peft else None
        args = use(max_steps=4, save_strategy="steps", save_steps=2)
        whole = train("dpo", tmp_path, path, args=args, peft_config=peft_config)
        trainer = build("dpo", tmp_path, path, args=use("never", max_steps=4), peft_config=peft_config)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        resumed = finished(trainer)
        assert [entry["loss"] for entry in resumed.logs[-2:]] == [entry["loss"] for entry in whole.logs[-2:]]
        assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())

    def test_resume_after_frozen(self, tmp_path, use):
        """The same reference by another provider is the same reference."""
        path = tiny.saved(tmp_path)
        args = {"ref_provider": "frozen", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        whole = train("dpo", tmp_path, path, args=args)
        trainer = build("dpo", tmp_path, path, args=use(max_steps=4))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert finished(trainer).logs[-1]["loss"] == pytest.approx(whole.logs[-1]["loss"], abs=1e-4)


class TestStreamsForEvaluation:
    def test_refused_at_once_where_the_policy_is_the_source(self, tmp_path, use):
        """
        It is refused at the start, and not after days of training, when the first evaluation cannot score its rows.
        """
        kwargs = {"eval_dataset": DATA["dpo"](4).to_iterable_dataset(), "args": use()}
        with pytest.raises(ConfigurationError, match="IterableDataset for evaluation"):
            build("dpo", tmp_path / "out", tiny.saved(tmp_path), **kwargs)

    def test_scored_by_the_adapter(self, tmp_path, use):
        kwargs = {"eval_dataset": DATA["dpo"](4).to_iterable_dataset(), "peft_config": lora()}
        args = {"eval_strategy": "steps", "eval_steps": 2}
        ours = train("dpo", tmp_path / "ours", tiny.saved(tmp_path), args=use(**args), **kwargs)
        assert_close(ours, train("dpo", tmp_path / "frozen", tiny.saved(tmp_path), args=args, **kwargs))


class TestNever:
    def test_names_the_row(self, tmp_path, use):
        LogProbStore(tmp_path / "store", mode="a").close()
        with pytest.raises(MissingRowError, match=r"24 of the 24 rows.*planned row 0, which begins 'the cat sat"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=use("never"))

    def test_stream_names_the_row(self, tmp_path, use):
        LogProbStore(tmp_path / "store", mode="a").close()
        data = DATA["dpo"]().to_iterable_dataset()
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=use("never"), train_dataset=data)
        with pytest.raises(MissingRowError, match=r"Row 0 of the batch, which begins 'the cat sat.*fill='never'"):
            trainer.train()

    def test_changes_nothing(self, tmp_path, use, store):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        before = sorted(file.name for file in store.iterdir())
        train("dpo", tmp_path, path, args=use("never"))
        assert sorted(file.name for file in store.iterdir()) == before


class TestVerify:
    def damage(self, store, other):
        """A store whose files are in order, but which has wrong values."""
        tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in store.glob("*.arrow")]
        with LogProbStore(other, mode="a") as wrong:
            for table in tables:
                keys = table["key"].to_pylist()
                wrong.put(keys, [row.values.to_numpy() + 0.01 for row in table["log_probs"]])

    def test_wrong_values_are_found_out(self, tmp_path, use, store):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        self.damage(store, tmp_path / "wrong")
        options = {"path": str(tmp_path / "wrong")}
        with pytest.raises(ReferenceMismatchError, match=r"4 rows of the store were scored again.* 0\.01"):
            build("dpo", tmp_path, path, args=use("never", options))
        trainer = build("dpo", tmp_path, path, args=use("never", {**options, "verify": 0}))
        with pytest.raises(ReferenceMismatchError, match="not the policy's"):
            trainer.train()  # this would be noticed by `ref_check`, not by the provider

    def test_right_values_pass_in_bfloat16(self, tmp_path, use):
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use(bf16=True))
        build("dpo", tmp_path, path, args=use("never", {"verify": 24}, bf16=True))

    def test_what_cannot_be_done_is_refused(self, tmp_path, use, store):
        path = tiny.saved(tmp_path)
        with pytest.raises(ConfigurationError, match=r"verify=8.*before training asks"):
            build("dpo", tmp_path, path, args=use("lazy", {"verify": 8}), peft_config=lora())
        stream = {"train_dataset": DATA["dpo"]().to_iterable_dataset(), "peft_config": lora()}
        LogProbStore(store, mode="a").close()
        with pytest.raises(ConfigurationError, match=r"verify=8.*not known"):
            build("dpo", tmp_path, path, args=use("never", {"verify": 8}), **stream)
        for options in ({}, {"verify": 0}):
            build("dpo", tmp_path, path, args=use("lazy", options), peft_config=lora())
            build("dpo", tmp_path, path, args=use("never", options), **stream)

    @pytest.mark.parametrize("options", [{}, {"verify": 2}])
    def test_of_a_model_that_is_sharded(self, options, tmp_path, use, zero_stage):
        """Its rows cannot be scored before training, and with fill='never' they are not scored later, either."""
        path = tiny.saved(tmp_path)
        build("dpo", tmp_path, path, args=use())
        trainer = build("dpo", tmp_path, path, args=use("never", options))
        provider = trainer.ref_model.provider
        zero_stage(trainer, 2)
        provider.setup(provider._context)
        assert provider.sample_check.rows == options.get("verify", 4)
        zero_stage(trainer, 3)
        with pytest.raises(ConfigurationError, match=r"verify=2.*sharded") if options else nullcontext():
            provider.setup(provider._context)


@pytest.fixture
def zero_stage(monkeypatch):
    """Make a trainer's accelerator look as it would under DeepSpeed."""

    def put(trainer, stage):
        state = trainer.accelerator.state
        monkeypatch.setitem(state.__dict__, "distributed_type", DistributedType.DEEPSPEED)
        monkeypatch.setitem(state.__dict__, "deepspeed_plugins", DeepSpeedPlugin(zero_stage=stage))

    return put


def test_parameters_that_are_whole_are_scored_as_asked(tmp_path, use, zero_stage):
    """ZeRO-1 and ZeRO-2 shard only gradients and the optimizer's state."""
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=use("lazy"), peft_config=lora())
    provider = trainer.ref_model.provider
    ids = torch.arange(10, 16).reshape(2, 3)
    for stage in (1, 2, 3):
        zero_stage(trainer, stage)
        provider.setup(provider._context)
        rows = ids + 10 * stage
        with pytest.raises(MissingRowError, match="ZeRO-3") if stage == 3 else nullcontext():
            assert trainer.ref_model(input_ids=rows, labels=rows, fused_lm_head=True).log_probs.abs().min() > 0


class TestEnds:
    def test_interrupted_while_filling(self, tmp_path, use, store, monkeypatch):
        """The rows that were scored are kept, and another run in this process can write to the store."""
        monkeypatch.setitem(scorer.TOKEN_BUDGET, "cpu", 64)
        policy, calls = tiny.model(), count()

        def interrupt(*_):
            if next(calls) == 7:  # after the probe, and after packed answers were compared with exact ones
                raise KeyboardInterrupt

        policy.get_input_embeddings().register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            build("dpo", tmp_path, policy, args=use())
        assert 0 < summarize(store).rows < 24
        with LogProbStore(store, mode="a") as store_again:
            assert store_again.other_writers == []
        assert interrupted  # as in a notebook, the traceback is kept, and the trainer with it

    def test_a_store_that_cannot_be_closed(self, tmp_path, use, store):
        given = {"ref_model": tiny.model(seed=1)}
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=use("lazy"), **given)
        ids = torch.arange(10, 16).reshape(2, 3)
        trainer.ref_model(input_ids=ids, labels=ids, fused_lm_head=True)
        shutil.rmtree(store)
        store.write_text("no directory")
        with pytest.raises(StoreError):
            trainer._refplug_session.close()
        assert trainer.ref_model.provider.module is None


class TestSelection:
    def test_trls_own_flag(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        args = {"precompute_ref_log_probs": True}
        run = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        assert_close(run, train("dpo", tmp_path, tiny.saved(tmp_path), ours=False, args=args))
        assert summarize(tmp_path / "cache" / "trl-refplug" / "log-probs").rows == 24

    @pytest.mark.parametrize("kind", OFFLINE)
    def test_reference_model(self, kind, tmp_path, use):
        path = tiny.saved(tmp_path)
        given = {"ref_model": tiny.model(seed=1)}
        cached = train(kind, tmp_path, path, args=use(), **given)
        assert_close(cached, train(kind, tmp_path, path, args={"ref_provider": "frozen"}, **given))
        with pytest.raises(MissingRowError):
            build(kind, tmp_path, path, args=use("never"))

    def test_reference_model_and_source(self, tmp_path, use):
        with pytest.raises(ConfigurationError, match="Keep one"):
            build(
                "dpo",
                tmp_path,
                tiny.saved(tmp_path),
                args=use(options={"source": "frozen"}),
                ref_model=tiny.model(seed=1),
            )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"source": "cached"}, "own source"),
            ({"source_kwargs": {"model": "x"}}, "needs option 'source'"),
            ({"verify": -1}, "negative"),
            ({"source": "frosen"}, "frozen"),
        ],
    )
    def test_options_that_cannot_work(self, options, message, tmp_path, use):
        with pytest.raises(ConfigurationError, match=message):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=use(options=options))

    def test_lazy_full_fine_tuning_needs_a_source(self, tmp_path, use):
        with pytest.raises(ConfigurationError, match='"source": "frozen"'):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=use("lazy"))

    @pytest.mark.parametrize("kind", ["grpo", "rloo"])
    def test_online_trainers(self, kind, tmp_path, use, caplog):
        path = tiny.saved(tmp_path)
        with pytest.raises(ConfigurationError, match="fill='lazy'"):
            build(kind, tmp_path, path, args=use(), peft_config=lora())
        run = train(kind, tmp_path, path, args=use("lazy"), peft_config=lora())
        assert "generates its completions" in caplog.text
        online = train(kind, tmp_path, path, args={"ref_provider": "adapter"}, peft_config=lora())
        assert_same(run, online)
