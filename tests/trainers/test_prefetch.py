"""
With and without prefetching, a run has the same numbers, the same random streams, and the same errors in the same
steps.
"""

import gc
import threading
import time
import traceback
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback
from trl import DPOTrainer

from trl_refplug import (
    Capabilities,
    ConfigurationError,
    InvalidLogProbsError,
    ReferenceIdentity,
    ReferenceMismatchError,
    ReferenceProvider,
    plug,
)
from trl_refplug.runtime.threads import Autocast, ScoringThread
from trl_refplug.testing.samples import image_preference_data, tiny_image_policy, tiny_image_processor
from trl_refplug.trainers import reference_model as reference_model

from .. import tiny
from .ahead import Ahead
from .runs import DATA, assert_same, build, finished, train, trainer_class


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def ahead(kind, out, model, **kwargs):
    """A trainer whose reference answers ahead of time, and that reference."""
    provider = kwargs.pop("provider", Ahead)()
    trainer = build(kind, out, model, reference=provider, **kwargs)
    provider.trainer = trainer
    return trainer, provider


def both(kind, tmp_path, model, **kwargs):
    """Do the same run with and without prefetching, compare them, and return the provider of the first."""
    trainer, provider = ahead(kind, tmp_path / "ahead", model, **kwargs)
    trainer.train()
    args = {**kwargs.pop("args", {}), "ref_prefetch": 0}
    other, afresh = ahead(kind, tmp_path / "afresh", model, args=args, **kwargs)
    other.train()
    assert afresh.ahead == 0
    assert afresh.afresh == other.ref_model.calls
    return finished(trainer), finished(other), provider


class TestSameRun:
    @pytest.mark.parametrize(
        "args",
        [
            {"max_steps": 5},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 5, "ref_prefetch": 1},
            {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 3, "ref_prefetch": 9},
        ],
        ids=["plain", "accumulation", "uneven epochs", "an epoch ahead"],
    )
    @pytest.mark.parametrize("kind", ["dpo", "kto"])
    def test_equals_trl(self, kind, args, tmp_path):
        path = tiny.saved(tmp_path)
        trainer, provider = ahead(kind, tmp_path, path, args=args)
        trainer.train()
        assert_same(finished(trainer), train(kind, tmp_path, path, ours=False, args=args))
        questions = 2 if kind == "kto" else 1
        first_step = min(args.get("gradient_accumulation_steps", 1), 3) * questions
        assert provider.afresh == first_step
        assert provider.ahead == trainer.ref_model.calls - first_step

    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("kind", ["dpo", "kto"])
    def test_under_autocast(self, kind, lora, tmp_path):
        path = tiny.saved(tmp_path)
        kwargs = {"args": {"bf16": True}}
        if lora:
            kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer, provider = ahead(kind, tmp_path, path, **kwargs)
        trainer.train()
        assert provider.ahead > 0
        assert_same(finished(trainer), train(kind, tmp_path, path, ours=False, **kwargs))

    # There is no shrinking, because failing examples are small already, and a run is slow.
    @settings(max_examples=8, phases=[Phase.generate])
    @given(
        rows=st.integers(4, 11),
        batch=st.integers(2, 4),  # KTO's KL term needs two
        accumulation=st.integers(1, 3),
        prefetch=st.integers(1, 5),
        drop_last=st.booleans(),
        kind=st.sampled_from(["dpo", "kto"]),
    )
    def test_any_shape(self, tmp_path_factory, rows, batch, accumulation, prefetch, drop_last, kind):
        tmp_path = tmp_path_factory.mktemp("run")
        seen = {}

        class Watched(trainer_class(kind)):
            def compute_loss(self, model, inputs, *args, **kwargs):
                state = self.accelerator.gradient_state
                facts = (inputs["input_ids"].tolist(), state.end_of_dataloader, state.remainder, state.sync_gradients)
                seen.setdefault(self.args.ref_prefetch, []).append(facts)
                return super().compute_loss(model, inputs, *args, **kwargs)

        args = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "ref_prefetch": prefetch,
            "dataloader_drop_last": drop_last,
            "num_train_epochs": 2,
            "max_steps": -1,
        }
        data = DATA[kind](rows)
        one, other, provider = both(kind, tmp_path, tiny.model(), args=args, cls=Watched, train_dataset=data)
        assert seen[prefetch] == seen[0]
        assert_same(one, other)
        questions = 2 if kind == "kto" else 1
        assert provider.most <= (accumulation + prefetch) * questions

    def test_workers_and_streams(self, tmp_path):
        data = tiny.preference_data(10).to_iterable_dataset()
        for args in (
            {"dataloader_num_workers": 1, "max_steps": 4, "per_device_train_batch_size": 3},
            {"max_steps": 9, "per_device_train_batch_size": 3, "accelerator_config": {"dispatch_batches": False}},
        ):
            one, other, provider = both("dpo", tmp_path, tiny.model(), args=args, train_dataset=data)
            assert_same(one, other)
            assert provider.ahead > 0

    def test_evaluation_in_between(self, tmp_path):
        args = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
        kwargs = {"args": args, "eval_dataset": tiny.preference_data(5)}
        one, other, provider = both("dpo", tmp_path, tiny.model(), **kwargs)
        assert_same(one, other)
        assert any("eval_loss" in entry for entry in one.logs)
        assert provider.ahead == 4  # batches of an evaluation are not prefetched

    @pytest.mark.parametrize("save_steps", [2, 3])
    def test_resumed_in_the_middle_of_an_epoch(self, save_steps, tmp_path):
        """The policy has dropout, so that losses depend on where the random stream is."""
        model = tiny.model("gpt2", resid_pdrop=0.1)
        args = {"disable_dropout": False, "per_device_train_batch_size": 2, "max_steps": 9, "ref_check": "off"}
        args |= {"save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 9}
        one, other, _ = both("dpo", tmp_path, model, args=args)
        assert_same(one, other)
        trainer, provider = ahead("dpo", tmp_path / "ahead", model, args=args)
        trainer.train(resume_from_checkpoint=str(tmp_path / "ahead" / f"checkpoint-{save_steps}"))
        assert provider.ahead > 0
        resumed = finished(trainer)
        assert [entry["loss"] for entry in resumed.logs] == [entry["loss"] for entry in one.logs]
        assert all(torch.equal(weight, one.weights[name]) for name, weight in resumed.weights.items())

    def test_stopped_early(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 3
                control.should_epoch_stop = state.global_step == 2

        args = {"num_train_epochs": 4, "max_steps": -1, "per_device_train_batch_size": 2}
        one, other, _ = both("dpo", tmp_path, tiny.model(), args=args, callbacks=[Stop()])
        assert_same(one, other)
        assert len(one.logs) == 3

    def test_what_is_not_needed_any_more_is_cancelled(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 2

        class Held(Ahead):
            """A provider that answers one batch, and is busy with something else after that."""

            released = threading.Event()

            def probe(self, batch):
                return None  # it is busy at the end, when it would be asked

            def submit(self, batch):
                if self.ahead == 1:
                    self._thread.submit(self.released.wait)
                return super().submit(batch)

        trainer, provider = ahead(
            "dpo", tmp_path, tiny.model(), provider=Held, callbacks=[Stop()], args={"max_steps": 9}
        )
        trainer.train()
        provider.released.set()
        assert [future.cancelled() for future in provider.futures] == [False, True]


class TestRandomStreams:
    def test_a_loader_that_draws_is_not_read_ahead(self, tmp_path, caplog):
        class Noisy:
            """A collator that draws random numbers for every batch, as random truncation or augmentation does."""

            def __init__(self, collator):
                self.collator = collator

            def __call__(self, rows):
                torch.rand(1)
                return self.collator(rows)

        def collator():
            return Noisy(build("dpo", tmp_path, tiny.model()).data_collator)

        model = tiny.model("gpt2", resid_pdrop=0.1)
        args = {"disable_dropout": False, "per_device_train_batch_size": 2, "max_steps": 5, "ref_check": "off"}
        one, other, provider = both("dpo", tmp_path, model, args=args, data_collator=collator())
        assert_same(one, other)
        assert len(provider.asked) < 5
        assert caplog.text.count("made with random numbers of the global streams") == 1

    def test_no_stream_moves(self, tmp_path):
        positions = {}

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                positions.setdefault(args.ref_prefetch, []).append(torch.get_rng_state())

        both("dpo", tmp_path, tiny.model(), args={"max_steps": 6}, callbacks=[Watch()])
        assert all(torch.equal(*pair) for pair in zip(positions[2], positions[0], strict=True))


class TestAsking:
    def test_how_far(self, tmp_path):
        """Only two batches are read ahead, none after the last step, and no batch is kept."""
        at_step = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                at_step.append((provider.ahead, provider.used))

        args = {"max_steps": 5, "per_device_train_batch_size": 2}
        trainer, provider = ahead("dpo", tmp_path, tiny.model(), args=args, callbacks=[Watch()])
        trainer.train()
        # The first batch is not prefetched. The second is asked about together with the two after it.
        assert at_step == [(0, 0), (3, 1), (4, 2), (4, 3), (4, 4)]

    def test_in_order(self, tmp_path):
        asked = []

        class Watched(trainer_class("kto")):
            def compute_loss(self, model, inputs, *args, **kwargs):
                asked.extend([inputs["KL_input_ids"], inputs["input_ids"]])
                return super().compute_loss(model, inputs, *args, **kwargs)

        trainer, provider = ahead("kto", tmp_path, tiny.model(), cls=Watched, args={"max_steps": 6})
        trainer.train()
        assert all(torch.equal(*pair) for pair in zip(provider.asked, asked[2:], strict=True))

    def test_kto_without_kl(self, tmp_path):
        args = {"loss_type": "apo_zero_unpaired", "max_steps": 4}
        one, other, provider = both("kto", tmp_path, tiny.model(), args=args)
        assert_same(one, other)
        assert (provider.afresh, provider.ahead) == (1, 3)

    def test_images(self, tmp_path):
        args = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": None}
        kwargs = {"processing_class": tiny_image_processor(), "train_dataset": image_preference_data(8)}
        one, other, provider = both("dpo", tmp_path, tiny_image_policy(), args=args, **kwargs)
        assert_same(one, other)
        assert (provider.afresh, provider.ahead) == (1, 3)

    def test_batches_that_are_changed_on_the_way(self, tmp_path, caplog):
        """It is changed in place, so that the prefetched batch would change with it."""

        class Masking(trainer_class("dpo")):
            def training_step(self, model, inputs, *args, **kwargs):
                inputs["input_ids"][:, 3] = 7
                return super().training_step(model, inputs, *args, **kwargs)

        args = {"max_steps": 6}
        one, other, provider = both("dpo", tmp_path, tiny.model(), cls=Masking, args=args)
        assert_same(one, other)
        assert provider.afresh == 6
        assert provider.ahead < 6
        assert caplog.text.count("asks its reference for other batches than its loader gave it") == 1

    def test_a_batch_that_is_left_out(self, tmp_path, caplog):
        class Skipping(trainer_class("dpo")):
            def training_step(self, model, inputs, *args, **kwargs):
                loss = super().training_step(model, inputs, *args, **kwargs)
                return loss * 0 if self.state.global_step == 2 else loss

            def compute_loss(self, model, inputs, *args, **kwargs):
                if self.state.global_step == 2:
                    return sum(p.sum() for p in model.parameters()) * 0
                return super().compute_loss(model, inputs, *args, **kwargs)

        one, other, provider = both("dpo", tmp_path, tiny.model(), cls=Skipping, args={"max_steps": 6})
        assert_same(one, other)
        assert provider.afresh == 1
        assert "other batches" not in caplog.text

    def test_autocast_of_the_trainers_own(self, tmp_path):
        """Autocast is entered in the loss, where the reference is called, and not where batches are fetched."""

        class Mine(DPOTrainer):
            def compute_loss(self, *args, **kwargs):
                with torch.autocast("cpu", torch.bfloat16):
                    return super().compute_loss(*args, **kwargs)

        one, other, provider = both("dpo", tmp_path, tiny.model(), cls=plug(Mine), args={"max_steps": 4})
        assert_same(one, other)
        assert provider.ahead == 3

    def test_a_users_own_fetching_sees_every_batch(self, tmp_path):
        class Mine(DPOTrainer):
            seen = ()

            def get_batch_samples(self, epoch_iterator, num_batches, device):
                batches = [next(epoch_iterator) for _ in range(num_batches)]
                self.seen = [*self.seen, *batches]
                return batches, None

        args = {"max_steps": 3, "per_device_train_batch_size": 4}
        trainer, provider = ahead("dpo", tmp_path, tiny.model(), cls=plug(Mine), args=args)
        trainer.train()
        assert provider.ahead == 2
        rows = {tuple(row) for batch in trainer.seen for row in batch["input_ids"].tolist()}
        assert len(rows) == 24

    def test_time_is_what_the_trainer_waited(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(reference_model, "time", SimpleNamespace(perf_counter=lambda: now[0]))

        class Late(Ahead):
            """A provider whose third answer takes long."""

            def submit(self, batch):
                answer = super().submit(batch)
                if self.ahead == 2:
                    answer, soon = Future(), answer
                    answer.result = lambda: wait_for(soon)
                return answer

        def wait_for(answer):
            now[0] += 1.0
            return answer.result()

        trainer, _ = ahead("dpo", tmp_path, tiny.model(), args={"max_steps": 6}, provider=Late)
        trainer.train()
        waited = [entry["ref/time"] for entry in trainer.state.log_history if "ref/time" in entry]
        assert waited == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


class TestFailures:
    class FailsAt(Ahead):
        """A provider whose fourth answer fails, in its own thread."""

        def submit(self, batch):
            if len(self.asked) == 2:
                self._scorer, scorer = _Broken(), self._scorer
                try:
                    return super().submit(batch)
                finally:
                    self._scorer = scorer
            return super().submit(batch)

    def test_an_answer_fails_at_its_own_step(self, tmp_path):
        trainer, _ = ahead("dpo", tmp_path, tiny.model(), args={"max_steps": 6}, provider=self.FailsAt)
        with pytest.raises(ZeroDivisionError) as caught:
            trainer.train()
        assert trainer.state.global_step == 3
        assert "on_the_providers_own_thread" in "".join(traceback.format_tb(caught.tb))

    def test_submit_itself_fails(self, tmp_path):
        class Refuses(Ahead):
            def submit(self, batch):
                if len(self.asked) == 2:
                    raise OverflowError("too long")
                return super().submit(batch)

        trainer, _ = ahead("dpo", tmp_path, tiny.model(), args={"max_steps": 6}, provider=Refuses)
        with pytest.raises(OverflowError, match="too long"):
            trainer.train()
        assert trainer.state.global_step == 3

    def test_an_answer_is_checked(self, tmp_path):
        class Nonsense(Ahead):
            def submit(self, batch):
                answer = super().submit(batch)
                if len(self.asked) > 1:
                    answer = Future()
                    answer.set_result(torch.full((8, batch.labels.shape[1] - 1), torch.nan))
                return answer

        trainer, _ = ahead("dpo", tmp_path, tiny.model(), provider=Nonsense)
        with pytest.raises(InvalidLogProbsError, match="not finite"):
            trainer.train()
        assert trainer.state.global_step == 2

    def test_the_data_fails_at_the_step_it_would(self, tmp_path):
        class Rows(torch.utils.data.Dataset):
            def __init__(self, data, bad):
                self.data, self.bad = data, bad

            def __len__(self):
                return len(self.data)

            def __getitem__(self, index):
                if index == self.bad:
                    raise OSError("bad sector")
                return self.data[index]

        steps = []
        for prefetch in (0, 3):
            args = {"ref_prefetch": prefetch, "max_steps": 10, "per_device_train_batch_size": 1}
            trainer, _ = ahead("dpo", tmp_path, tiny.model(), args=args)
            order = list(trainer.get_train_dataloader().batch_sampler)
            trainer.train_dataset = Rows(trainer.train_dataset, bad=order[6][0])
            with pytest.raises(OSError, match="bad sector"):
                trainer.train()
            steps.append(trainer.state.global_step)
        assert steps[0] == steps[1] > 1

    def test_the_reference_is_still_checked(self, tmp_path):
        class Another(Ahead):
            def pin(self, context):
                module = super().pin(context)
                with torch.no_grad():
                    module.lm_head.weight *= 1.1
                return module

        with pytest.raises(ReferenceMismatchError, match="is not the one that was declared"):
            ahead("dpo", tmp_path, tiny.model(), provider=Another)

    def test_threads_end(self, tmp_path):
        def scoring():
            return sum(thread.name.startswith("refplug-scoring") for thread in threading.enumerate())

        before = scoring()
        trainer, provider = ahead("dpo", tmp_path, tiny.model())
        trainer.train()
        assert scoring() > before
        provider.trainer = None
        del trainer
        gc.collect()
        deadline = time.monotonic() + 10
        while scoring() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert scoring() <= before


class _Broken:
    def log_probs(self, batch):
        return self.on_the_providers_own_thread()

    def on_the_providers_own_thread(self):
        return 1 / 0


class TestWho:
    class Both(ReferenceProvider):
        capabilities = Capabilities(moving=True, overlap=True)

        def identity(self):
            return ReferenceIdentity("both", "0")

        def log_probs(self, batch):
            return torch.zeros(batch.labels.shape[0], batch.labels.shape[1] - 1)

    def test_a_moving_reference_is_refused(self, tmp_path):
        with pytest.raises(ConfigurationError, match="declares both `moving` and `overlap`"):
            build("dpo", tmp_path, tiny.model(), reference=self.Both())

    def test_not_on_the_policys_own_device(self, tmp_path):
        for device in (None, "cpu", "cpu:0"):
            args = {"ref_provider": "frozen", "ref_provider_kwargs": {"device": device}}
            trainer = build("dpo", tmp_path, tiny.model(), args=args)
            assert not trainer.ref_model.provider.capabilities.overlap

    def test_generating_trainers_ask_behind_the_rewards_only(self, tmp_path):
        trainer, provider = ahead("grpo", tmp_path, tiny.model())
        trainer.train()
        assert trainer._refplug_session.prefetcher is None
        assert provider.afresh == 0
        assert provider.ahead > 0

    @pytest.mark.parametrize("value", [-1, "2", 1.5])
    def test_ref_prefetch_is_a_number_of_batches(self, value, tmp_path):
        with pytest.raises(ConfigurationError, match="`ref_prefetch` must be a number of batches"):
            build("dpo", tmp_path, tiny.model(), args={"ref_prefetch": value})


class TestScoringThread:
    def test_scores_under_the_callers_autocast(self):
        layer, thread = nn.Linear(64, 64), ScoringThread()
        inputs = torch.randn(8, 64)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                here = layer(inputs)
                there = thread.submit(lambda: layer(inputs))
            assert there.result().dtype == here.dtype
            assert torch.equal(there.result(), here.detach())
            assert not there.result().requires_grad
        assert not Autocast.current().states[0][1]
        thread.close()

    def test_leaves_the_policys_casts_alone(self):
        """In one forward pass a weight that is used twice is cast once, whatever other threads do meanwhile."""
        layer, thread = nn.Linear(8, 8, bias=False), ScoringThread()
        inputs = torch.randn(2, 8)

        def score():
            with torch.autocast("cpu", torch.bfloat16):
                return layer(inputs)

        with torch.autocast("cpu", torch.bfloat16):
            before = _source(layer(inputs))
            thread.submit(score).result()
            assert _source(layer(inputs)) is before
        thread.close()


def _source(output):
    """The node of the autograd graph that cast the weight."""
    nodes = [node for node, _ in output.grad_fn.next_functions if node is not None]
    while nodes:
        node = nodes.pop()
        if "ToCopy" in node.name():
            return node
        nodes.extend(parent for parent, _ in node.next_functions if parent is not None)
    raise AssertionError("nothing was cast")


def test_streams_may_be_short(tmp_path):
    """A stream that ends in the middle of an optimizer step."""
    data = Dataset.from_list(list(tiny.preference_data(5))).to_iterable_dataset()
    args = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one, other, _ = both("dpo", tmp_path, tiny.model(), args=args, train_dataset=data)
    assert_same(one, other)
