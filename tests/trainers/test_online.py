"""GRPO and RLOO: one question for a whole generation batch, answered while the rewards are computed."""

import threading
from concurrent.futures import Future

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from trl_refplug import Capabilities, InvalidLogProbsError, RefPlugError, SeamError, plug
from trl_refplug.provider import ReferenceBatch
from trl_refplug.runtime.threads import ScoringThread
from trl_refplug.trainers.online import AwaitedLogProbs

from .. import tiny
from .ahead import Ahead
from .runs import DATA, ONLINE, TRL, assert_same, build, finished, train, trainer_class
from .test_trl_patch import Uniform


class Watched(Ahead):
    """A frozen copy on a thread of its own, which knows what it was asked about."""

    used = 0


def same_as_trl(kind, tmp_path, reference=None, **kwargs):
    theirs = train(kind, tmp_path / "trl", tiny.saved(tmp_path), ours=False, **kwargs)
    ours = train(kind, tmp_path / "ours", tiny.saved(tmp_path), reference=reference or Watched(), **kwargs)
    assert_same(ours, theirs)
    return ours


class TestEqualsTRL:
    """The answers are awaited after the rewards, and every number is TRL's, bit for bit."""

    @pytest.mark.parametrize("steps_per_generation", [1, 2, 4])
    @pytest.mark.parametrize("num_iterations", [1, 2])
    @pytest.mark.parametrize("kind", ONLINE)
    def test_generation_batches(self, kind, num_iterations, steps_per_generation, tmp_path):
        args = {"num_iterations": num_iterations, "steps_per_generation": steps_per_generation, "max_steps": 4}
        args |= {"gradient_accumulation_steps": 2} if (num_iterations, steps_per_generation) == (1, 2) else {}
        provider = Watched()
        ours = same_as_trl(kind, tmp_path, provider, args=args)
        micro_batches = 4 * args.get("gradient_accumulation_steps", 1)
        generations = -(-micro_batches // (num_iterations * steps_per_generation))
        assert ours.trainer.ref_model.calls == generations
        # TRL's own slices, and none of them when the answer was needed
        assert [len(ids) for ids in provider.asked] == [4] * generations * steps_per_generation

    @pytest.mark.parametrize("kind", ONLINE)
    def test_evaluation_and_masked_completions(self, kind, tmp_path):
        args = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 6}
        args |= {"mask_truncated_completions": True, "max_completion_length": 6}
        ours = same_as_trl(kind, tmp_path, args=args, eval_dataset=DATA[kind](6))
        assert any("eval_loss" in entry for entry in ours.logs)

    @pytest.mark.parametrize("kind", ONLINE)
    def test_resume(self, kind, tmp_path):
        args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "steps_per_generation": 2}
        model = tiny.saved(tmp_path)
        whole = train(kind, tmp_path, model, reference=Watched(), args=args)
        trainer = build(kind, tmp_path, model, reference=Watched(), args=args)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        theirs = build(kind, tmp_path, model, ours=False, args=args)
        theirs.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same(finished(trainer), finished(theirs))
        assert_same(finished(trainer), whole)

    def test_several_turns(self, tmp_path):
        """Tokens of an environment are attended to, scored, and left out of the loss."""

        def rollout(prompts, trainer):
            ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
            turns = [[7 + (len(own) + i) % 50 for i in range(4 + row % 3)] for row, own in enumerate(ids)]
            masks = [[0 if i in (1, 2) else 1 for i in range(len(turn))] for turn in turns]
            return {"prompt_ids": ids, "completion_ids": turns, "logprobs": None, "env_mask": masks}

        same_as_trl("grpo", tmp_path, rollout_func=rollout, args={"steps_per_generation": 2})

    @pytest.mark.parametrize("kind", ONLINE)
    def test_whole_batches_of_a_model_that_packs(self, kind, tmp_path):
        args = {"steps_per_generation": 2, "ref_provider": "frozen"}
        exact = train(kind, tmp_path / "exact", tiny.saved(tmp_path), args=args)
        args |= {"ref_provider_kwargs": {"scoring": "packed"}}
        packed = train(kind, tmp_path / "packed", tiny.saved(tmp_path), args=args)
        for ours, theirs in zip(packed.logs, exact.logs, strict=True):
            assert ours.get("kl") == pytest.approx(theirs.get("kl"), abs=1e-4)
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


class TestHidden:
    @pytest.mark.parametrize("kind", ONLINE)
    def test_reference_and_rewards_work_at_the_same_time(self, kind, tmp_path):
        """Each of the two waits until the other has begun: one after the other, they would never end."""
        reference_begun, reward_begun = threading.Event(), threading.Event()

        class Waits(Uniform):
            capabilities = Capabilities(temperature=True, overlap=True)

            def submit(self, batch):
                def score():
                    reference_begun.set()
                    assert reward_begun.wait(60)
                    return Uniform.log_probs(self, batch)

                return self.thread.submit(score)

            def log_probs(self, batch):
                return Uniform.log_probs(self, batch)

            def setup(self, context):
                self.thread = ScoringThread()

            def close(self):
                self.thread.close()

            def __deepcopy__(self, memo):
                return self

        def reward(completions, **_):
            reward_begun.set()
            assert reference_begun.wait(60)
            return tiny.length_reward(completions)

        run = train(kind, tmp_path, tiny.saved(tmp_path), reference=Waits(), reward_funcs=reward)
        assert run.trainer.state.global_step == 3

    def test_prefetch_of_none_waits_at_once(self, tmp_path):
        provider = Watched()
        trainer = build("grpo", tmp_path, tiny.saved(tmp_path), reference=provider, args={"ref_prefetch": 0})
        trainer.train()
        assert provider.ahead == 0
        assert provider.afresh > 0

    def test_rewards_of_a_class_that_computes_them_itself(self, tmp_path):
        class Own(GRPOTrainer):
            def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
                return torch.tensor(tiny.length_reward(completions)).unsqueeze(1)

        theirs = train("grpo", tmp_path / "trl", tiny.saved(tmp_path), cls=Own)
        ours = train("grpo", tmp_path / "ours", tiny.saved(tmp_path), cls=plug(Own), reference=Watched())
        assert [entry["kl"] for entry in ours.logs] == [entry["kl"] for entry in theirs.logs]


class Held(Uniform):
    """Its answers are what the test makes of them."""

    capabilities = Capabilities(temperature=True, overlap=True)

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer
        self.futures = []

    def submit(self, batch):
        self.futures.append(Future())
        if self.answer is not None:
            self.answer(self.futures[-1], batch)
        return self.futures[-1]

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("kind", ONLINE)
class TestFailures:
    """Nothing is trained on, and nothing is left in flight."""

    def trained(self, kind, tmp_path, reference, error, match, cls=None, **kwargs):
        cls = cls or trainer_class(kind)
        trainer = build(kind, tmp_path, tiny.saved(tmp_path), cls=cls, reference=reference, **kwargs)
        with pytest.raises(error, match=match):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(future.done() for future in reference.futures)
        return trainer

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_rewards_that_raise(self, kind, error, tmp_path):
        def reward(completions, **_):
            raise error("no rewards today")

        held = Held()
        self.trained(kind, tmp_path, held, error, "no rewards today", reward_funcs=reward)
        assert held.futures
        assert all(future.cancelled() for future in held.futures)

    def test_an_answer_that_fails(self, kind, tmp_path):
        held = Held(lambda future, batch: future.set_exception(OSError("the server is gone")))
        self.trained(kind, tmp_path, held, OSError, "the server is gone")

    def test_an_answer_that_is_cancelled(self, kind, tmp_path):
        held = Held(lambda future, batch: future.cancel())
        self.trained(kind, tmp_path, held, RefPlugError, "had been cancelled")

    def test_a_question_that_cannot_be_asked(self, kind, tmp_path):
        class Full(Held):
            capabilities = Capabilities(temperature=True, overlap=True, local_model=True)  # asked in two slices

            def submit(self, batch):
                if self.futures:
                    raise OSError("no more room")
                return super().submit(batch)

        self.trained(kind, tmp_path, Full(), OSError, "no more room", args={"steps_per_generation": 2})

    def test_an_answer_that_is_not_finite(self, kind, tmp_path):
        def answer(future, batch):
            future.set_result(torch.full(batch.labels[:, 1:].shape, torch.nan))

        self.trained(kind, tmp_path, Held(answer), InvalidLogProbsError, "not finite")

    def test_a_trainer_that_reads_early(self, kind, tmp_path):
        class Early(TRL[kind]):
            def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
                log_probs, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
                return log_probs * 1.0, *others

        message = r"read the reference's log-probs \(mul\) before .* `ref_prefetch=0`"
        self.trained(kind, tmp_path, Held(), SeamError, message, cls=plug(Early))
        theirs = train(kind, tmp_path / "trl", tiny.saved(tmp_path), ours=False)
        args = {"ref_prefetch": 0}
        assert_same(
            train(kind, tmp_path, tiny.saved(tmp_path), cls=plug(Early), reference=Watched(), args=args), theirs
        )

    def test_a_trainer_that_never_computes_rewards(self, kind, tmp_path):
        class Rewardless(TRL[kind]):
            def _generate_and_score_completions(self, inputs):
                ids = torch.ones(4, 5, dtype=torch.long)
                log_probs, *_ = self._get_per_token_logps_and_entropies(self.ref_model, ids, ids, 2, batch_size=2)
                return {"ref_per_token_logps": log_probs}

        self.trained(kind, tmp_path, Held(), SeamError, "never computed rewards", cls=plug(Rewardless))


class TestAwaited:
    def test_nothing_can_be_computed_with_it(self):
        place = AwaitedLogProbs.of(torch.empty(0), (2, 3))
        assert (place.shape, place.dtype, len(place)) == ((2, 3), torch.float32, 2)
        for reads in (repr, torch.exp, torch.Tensor.tolist, lambda t: t[0], lambda t: torch.cat([t, t]), torch.isnan):
            with pytest.raises(SeamError, match="before it had computed the rewards"):
                reads(place)

    def test_filled_it_is_a_tensor_as_any(self):
        place = AwaitedLogProbs.of(torch.empty(0), (2, 3))
        held = {"ref_per_token_logps": place}
        place.fill(torch.ones(2, 3))
        assert type(held["ref_per_token_logps"]) is torch.Tensor
        assert (held["ref_per_token_logps"] + 1).tolist() == [[2.0] * 3] * 2


class TestPasses:
    def batch(self, rows, **kwargs):
        ids = torch.arange(rows * 4).reshape(rows, 4)
        return ReferenceBatch(ids, torch.ones_like(ids), ids, **kwargs)

    def test_of_the_trainers_size(self):
        batch = self.batch(
            5, rows_per_pass=2, extras={"token_type_ids": torch.arange(5).unsqueeze(1), "scale": torch.ones(())}
        )
        passes = batch.in_passes()
        assert [len(part.input_ids) for part in passes] == [2, 2, 1]
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(torch.cat([getattr(part, name) for part in passes]), getattr(batch, name))
        assert [part.extras["token_type_ids"].flatten().tolist() for part in passes] == [[0, 1], [2, 3], [4]]
        assert all(part.extras["scale"] is batch.extras["scale"] for part in passes)

    def test_whole_where_it_cannot_be_cut_or_need_not_be(self):
        for batch in (
            self.batch(4),
            self.batch(4, rows_per_pass=4),
            self.batch(4, rows_per_pass=2, rows_sliceable=False),
        ):
            assert batch.in_passes() == [batch]


def test_a_packed_batch_shares_the_prompts_of_whole_groups(tmp_path):
    """8 completions of 64 tokens to a prompt of 512, of which TRL scores two rows at a time."""
    words = " ".join(tiny.WORDS.split() * 20)
    tokenizer = tiny.tokenizer()
    prompt = tokenizer.decode(tokenizer(words)["input_ids"][:512])
    tokens = len(tokenizer(prompt)["input_ids"])
    args = {"per_device_train_batch_size": 2, "num_generations": 8, "steps_per_generation": 4, "max_steps": 4}
    args |= {"max_completion_length": 64, "generation_kwargs": {"min_new_tokens": 64}}
    args |= {"ref_provider": "frozen", "ref_provider_kwargs": {"scoring": "packed"}, "ref_check": "off"}
    model = tiny.model(max_position_embeddings=1024)
    trainer = build("grpo", tmp_path, model, args=args, train_dataset=Dataset.from_list([{"prompt": prompt}] * 8))
    scorer = trainer.ref_model.provider._scorer
    scorer.stats.clear()
    trainer.train()
    seen = scorer.stats
    assert seen.fallback is None
    padded = 8 * (tokens + 64)  # TRL's
    assert (seen.rows, seen.padded_tokens) == (8, padded)
    assert seen.unique_tokens <= tokens + 8 * 64
    assert padded >= 4 * seen.unique_tokens
