"""
What a reference that answers elsewhere adds to GRPO and RLOO, whose rewards take as long as its answer. Prints; run
with `-m benchmark -s`, on an idle machine.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests import tiny
from tests.benchmarks.test_overlap import MODEL, Delayed
from tests.trainers.runs import ONLINE, build
from trl_refplug import Capabilities


pytestmark = pytest.mark.benchmark

SECONDS = 0.15
STEPS = 12


class Served(Delayed):
    capabilities = Capabilities(overlap=True, temperature=True)


def generations(kind: str, tmp_path: Path, *, reference: float, reward: float, **args: Any) -> float:
    """Seconds from the completions of a generation batch to its last use before training: the median."""

    def rewards(completions: list[str], **_: Any) -> list[float]:
        time.sleep(reward)
        return tiny.length_reward(completions)

    args = {"max_steps": STEPS, "ref_check": "off", "logging_steps": 1000, **args}
    provider = Served(reference)
    trainer = build(kind, tmp_path, tiny.saved(tmp_path), reference=provider, reward_funcs=rewards, args=args)
    begun: list[float] = []
    taken: list[float] = []
    ask, answer = trainer._get_per_token_logps_and_entropies, trainer._calculate_rewards

    def asked(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is trainer.ref_model:
            begun.append(time.perf_counter())
        return ask(model, *args, **kwargs)

    def answered(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        taken.append(time.perf_counter() - begun[-1])
        return result

    trainer._get_per_token_logps_and_entropies, trainer._calculate_rewards = asked, answered
    trainer.train()
    provider.close()
    return statistics.median(taken)


@pytest.mark.parametrize("kind", ONLINE)
def test_injected_delays(kind: str, tmp_path: Path) -> None:
    both = generations(kind, tmp_path, reference=SECONDS, reward=SECONDS)
    waited = generations(kind, tmp_path, reference=SECONDS, reward=SECONDS, ref_prefetch=0)
    print(
        f"\n{kind}: a reference and a reward of {1e3 * SECONDS:.0f} ms each take {1e3 * both:.1f} ms, "
        f"{both / SECONDS:.3f}x of one of them; one after the other {waited / SECONDS:.3f}x"
    )


def test_packed_groups(tmp_path: Path) -> None:
    """8 completions of 64 tokens to a prompt of 512, two rows at a time: exact, which is TRL's way, and packed."""
    tokenizer = tiny.tokenizer()
    prompt = tokenizer.decode(tokenizer(" ".join(tiny.WORDS.split() * 20))["input_ids"][:512])
    model = tiny.saved(tmp_path, **{**MODEL, "max_position_embeddings": 1024})
    data = Dataset.from_list([{"prompt": prompt}] * 8)
    shape = {"per_device_train_batch_size": 2, "num_generations": 8, "steps_per_generation": 4, "max_steps": 8}
    shape |= {"max_completion_length": 64, "generation_kwargs": {"min_new_tokens": 64}, "ref_check": "off"}

    def reference(scoring: str) -> float:
        args = {**shape, "ref_provider": "frozen", "ref_provider_kwargs": {"scoring": scoring}}
        trainer = build("grpo", tmp_path, model, args=args, train_dataset=data)
        trainer.train()
        return float(trainer.ref_model.seconds / trainer.ref_model.calls)

    times = [(reference("exact"), reference("packed")) for _ in range(3)][1:]
    exact, packed = (statistics.median(each) for each in zip(*times, strict=True))
    print(
        f"\na generation batch: exact {1e3 * exact:.0f} ms, packed {1e3 * packed:.0f} ms, {exact / packed:.1f}x less"
    )
