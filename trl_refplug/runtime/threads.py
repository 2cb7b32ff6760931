"""
Scoring on a thread of its own, while the trainer's thread goes on.

torch keeps autocast and gradient mode per thread: a new one has neither, and would answer with other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Autocast:
    """
    What autocast does on one thread.

    Args:
        states (`tuple[tuple[str, bool, torch.dtype], ...]`): Device type, whether it is enabled there, and its dtype.
    """

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> Autocast:
        """That of the calling thread."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        return cls(
            tuple((type_, torch.is_autocast_enabled(type_), torch.get_autocast_dtype(type_)) for type_ in types)
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same on whatever thread this is, until the block ends."""
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.states:
                stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
            yield


class ScoringThread:
    """One thread that scores in the order in which it is asked."""

    def __init__(self) -> None:
        # The outermost autocast context of a thread empties, on leaving, a cache that all threads share. In the
        # middle of the policy's forward pass that would change how its gradients are rounded, so that no context of
        # this thread may be the outermost.
        self._executor = ThreadPoolExecutor(1, "refplug-scoring", initializer=torch.autocast_increment_nesting)

    def submit(self, score: Callable[[], Tensor]) -> Future[Tensor]:
        """Call `score` on the thread, under the caller's autocast and without gradient."""
        autocast = Autocast.current()

        def run() -> Tensor:
            with torch.no_grad(), autocast.entered():
                return score()

        return self._executor.submit(run)

    def close(self) -> None:
        """Finish what is being scored, and nothing more. Does not wait for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)
