"""Two real processes with gloo on the CPU."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from trl_refplug.testing.bench import Bench


def on_two_ranks(bench: Bench) -> dict[int, tuple[str, list[list[float]]]]:
    """Train on two ranks, as torchrun starts them: by rank, the identity's digest and the sample batch's values."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    try:
        pickle.dumps(bench)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        pytest.fail(
            f"What the fixtures return cannot be sent to another process ({error}). Define the provider's class at "
            "the top of a module, or return its registered name.",
            pytrace=False,
        )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        with _signal_handlers_kept():
            results: dict[int, Any] = elastic_launch(config, _on_one_rank)(bench)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        told = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        pytest.fail(f"Rank {failure.local_rank} of two failed: {told}", pytrace=False)
    return results


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """torch's launcher leaves its own behind, and Ctrl-C would not be a KeyboardInterrupt in what pytest runs next."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _on_one_rank(bench: Bench) -> tuple[str, list[list[float]]]:
    import os

    from torch.distributed import destroy_process_group, is_initialized
    from torch.distributed.elastic.multiprocessing.errors import record

    @record  # so that the parent is told which error it was
    def run() -> tuple[str, list[list[float]]]:
        directory = bench.directory / f"rank{os.environ['RANK']}"
        attached = bench.using(directory=directory).attach(ddp_backend="gloo")
        values = [row.tolist() for row in attached.ask_rows(attached.batch)]
        attached.trainer.train()
        return attached.provider.identity().digest, values

    try:
        result = run()
        assert result is not None
        return result
    finally:
        if is_initialized():
            destroy_process_group()
