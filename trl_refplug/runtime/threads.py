"""
Score on a separate thread while the trainer's thread goes on.

In torch, autocast and gradient mode belong to a thread. A new thread starts without the caller's, and would give other
numbers, so both are set explicitly here.
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
    The state of autocast on a thread, which can be entered on another one.

    Args:
        states (`tuple[tuple[str, bool, torch.dtype], ...]`): For each device type, its name, whether autocast is
            enabled on it, and the dtype of autocast.
    """

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> Autocast:
        """The state on the calling thread, for the CPU and the accelerator in use."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        return cls(
            tuple((type_, torch.is_autocast_enabled(type_), torch.get_autocast_dtype(type_)) for type_ in types)
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Give the calling thread this state while the context lasts."""
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.states:
                stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
            yield


class ScoringThread:
    """A thread that scores batches one after the other, in the order in which they are submitted."""

    def __init__(self) -> None:
        # Autocast keeps a cache of casted weights that all threads share, and leaving the outermost autocast context
        # of any thread empties it. In the middle of the policy's forward pass, that would change how its gradients are
        # rounded. The initializer keeps every context on this thread from being the outermost one.
        self._executor = ThreadPoolExecutor(1, "refplug-scoring", initializer=torch.autocast_increment_nesting)

    def submit(self, score: Callable[[], Tensor]) -> Future[Tensor]:
        """Call `score` on the thread, with the caller's autocast state and without gradients."""
        autocast = Autocast.current()

        def run() -> Tensor:
            with torch.no_grad(), autocast.entered():
                return score()

        return self._executor.submit(run)

    def close(self) -> None:
        """Cancel what has not been started. The call that is running finishes, but this does not wait for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)
