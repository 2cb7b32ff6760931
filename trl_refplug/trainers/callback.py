"""The callback that tells the session of the reference when training begins, makes a step and ends."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from trl_refplug.trainers.session import ReferenceSession


class SessionCallback(TrainerCallback):  # type: ignore[misc]
    """
    Tells the session where training is, and measures how many seconds of an optimizer step go to the reference, and
    which share of the step that is.
    """

    def __init__(self, session: ReferenceSession) -> None:
        self.session = session
        self._step_started: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._step_seconds = 0.0
        self._reference_seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.session.training_begins()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.session.reference_model is not None
        self.session.step_begins()
        self._step_started = time.perf_counter()
        self._reference_before = self.session.reference_model.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.session.reference_model is not None
        if self._step_started is not None:
            self._step_seconds += time.perf_counter() - self._step_started
            self._reference_seconds += self.session.reference_model.seconds - self._reference_before
            self._steps += 1
            self._step_started = None
        self.session.step_ended(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.training_ended(state.global_step)

    def pop_averages(self) -> dict[str, float]:
        """What TRL is to log: averages over the steps since the last call; empty if no step has ended since."""
        if self._steps == 0:
            return {}
        logs = {
            "ref/time": self._reference_seconds / self._steps,
            "ref/time_share": self._reference_seconds / max(self._step_seconds, 1e-9),
        }
        logs.update({f"ref/{name}": float(value) for name, value in self.session.provider.counters().items()})
        if self.session.monitor is not None:
            logs.update({f"ref/{name}": value for name, value in self.session.monitor.take().items()})
        self._reset()
        return logs
