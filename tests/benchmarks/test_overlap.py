"""
What a reference that answers elsewhere costs a training step. Prints; run with `-m benchmark -s`, on an idle machine.

A DPO step with a reference is compared with the same step, on the same batches, whose reference costs nothing. Runs
alternate, so that whatever else the machine does falls on all of them; each step counts with its median over rounds.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from tests import tiny
from tests.trainers.runs import build
from trl_refplug import Capabilities, ReferenceBatch, ReferenceIdentity, ReferenceProvider


pytestmark = pytest.mark.benchmark

STEPS = 20
FIRST = 4  # steps that are not timed: nothing is in flight yet
ROUNDS = 3
ROOT = Path(__file__).parents[2]
MODEL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 512}


class Instant(ReferenceProvider):
    """Costs nothing: answers with what it knows by heart, and with zeros elsewhere."""

    def __init__(self, answers: dict[bytes, Tensor] | None = None) -> None:
        super().__init__()
        self._answers = answers or {}

    def identity(self) -> ReferenceIdentity:
        return ReferenceIdentity("instant", "0")

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        known = self._answers.get(batch.input_ids.numpy().tobytes())
        return torch.zeros(batch.labels.shape[0], batch.labels.shape[1] - 1) if known is None else known.clone()


class Delayed(Instant):
    """A server that takes `seconds` for a batch, one after the other, and none of this machine's processor."""

    capabilities = Capabilities(overlap=True)

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._free = 0.0
        self._server = ThreadPoolExecutor(1)

    def __deepcopy__(self, memo: Any) -> Delayed:
        return self

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        return self.submit(batch).result()

    def submit(self, batch: ReferenceBatch) -> Future[Tensor]:
        self._free = done = max(self._free, time.perf_counter()) + self._seconds

        def answer() -> Tensor:
            time.sleep(max(0.0, done - time.perf_counter()))
            return Instant.log_probs(self, batch)

        return self._server.submit(answer)

    def close(self) -> None:
        self._server.shutdown(wait=False, cancel_futures=True)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the beginning of one step to that of the next."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def __deepcopy__(self, memo: Any) -> Clock:
        return self

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.begun[FIRST:], self.begun[FIRST + 1 :], strict=False)]


def data() -> Dataset:
    words = tiny.WORDS.split() * 4
    rows = [
        (words[i : i + 15 + i % 12], words[i + 3 : i + 33 + i % 20], words[i + 7 : i + 42 + i % 17]) for i in range(96)
    ]
    return Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), map(" ".join, row), strict=True)) for row in rows]
    )


def steps(
    tmp_path: Path, model: str, *, prepare: Callable[[Any], Any] = lambda trainer: None, **kwargs: Any
) -> list[float]:
    """The duration of each timed step of a run."""
    clock = Clock()
    args = {
        "max_steps": STEPS + FIRST + 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1000,
        "learning_rate": 1e-6,
        "ref_check": "off",
    }
    args |= kwargs.pop("args", {})
    trainer = build("dpo", tmp_path, model, args=args, train_dataset=data(), callbacks=[clock], **kwargs)
    prepare(trainer)
    trainer.train()
    for provider in trainer._refplug_session.providers:
        provider.close()
    return clock.steps


def recorded(tmp_path: Path, model: str, args: dict[str, Any]) -> dict[bytes, Tensor]:
    """The answers of a run. With others its losses and gradients differ, and so may the time its steps take."""
    answers: dict[bytes, Tensor] = {}

    def record(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        answers[inputs["input_ids"].numpy().tobytes()] = output.log_probs.clone()

    steps(
        tmp_path,
        model,
        args=args,
        prepare=lambda trainer: trainer.ref_model.register_forward_hook(record, with_kwargs=True),
    )
    return answers


def alternating(*runs: Callable[[], list[float]]) -> list[float]:
    """Seconds per step of each run: the median over rounds of every step, averaged over steps."""
    rounds = [[run() for run in runs] for _ in range(ROUNDS + 1)][1:]
    return [statistics.mean(map(statistics.median, zip(*of_run, strict=True))) for of_run in zip(*rounds, strict=True)]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return tiny.saved(tmp_path, **MODEL)


@pytest.fixture
def one_core() -> Iterator[int | None]:
    """This process on one core; gives another one, if there is."""
    before = os.sched_getaffinity(0)
    mine, *others = sorted(before)
    os.sched_setaffinity(0, {mine})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield others[0] if others else None
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, before)


def test_injected_delay(tmp_path: Path, model: str, one_core: int | None) -> None:
    step = statistics.median(steps(tmp_path, model, reference=Instant()))
    fast, slow = 0.9 * step, 1.5 * step
    none, hidden, waited, unhidden = alternating(
        lambda: steps(tmp_path, model, reference=Instant()),
        lambda: steps(tmp_path, model, reference=Delayed(fast)),
        lambda: steps(tmp_path, model, reference=Delayed(slow)),
        lambda: steps(tmp_path, model, reference=Delayed(fast), args={"ref_prefetch": 0}),
    )
    print(
        f"\nno reference: {1e3 * none:.1f} ms a step\n"
        f"answers after {1e3 * fast:.0f} ms: {hidden / none:.3f}x of that; not asked ahead {unhidden / none:.3f}x\n"
        f"answers after {1e3 * slow:.0f} ms, slower than the step: {waited / slow:.3f}x of the answer"
    )


def test_served_on_another_core(tmp_path: Path, model: str, one_core: int | None) -> None:
    pytest.importorskip("trl_refplug.serving")
    if one_core is None:
        pytest.skip("needs two cores")
    command = [sys.executable, "-m", "trl_refplug", "serve", model, "--port", "0", "--scoring", "exact"]
    server = subprocess.Popen(
        ["taskset", "--cpu-list", str(one_core), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        found = re.search(r" at (http://\S+)", server.stdout.readline())
        assert found is not None
        remote = {"ref_provider": "remote", "ref_provider_kwargs": {"url": found[1]}}
        answers = recorded(tmp_path, model, remote)
        none, ahead = alternating(
            lambda: steps(tmp_path, model, reference=Instant(answers)),
            lambda: steps(tmp_path, model, args=remote),
        )
    finally:
        server.terminate()
        server.wait(30)
    print(
        f"\nno reference: {1e3 * none:.1f} ms a step\n`trl-refplug serve` on another core: {ahead / none:.3f}x of that"
    )
