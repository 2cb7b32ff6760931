"""Two real processes with gloo on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from trl_refplug.testing.bench import Bench


_PRELOADED = ["trl_refplug.testing.bench", "trl_refplug.trainers", "datasets", "peft"]


def start_method() -> str:
    """`forkserver` where there is one: a single process imports TRL, for all ranks of all tests to come."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    return "forkserver"


def launch(function: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """
    Call a function on two ranks, as torchrun would run a script: it has the environment variables, and where one rank
    fails the other is ended.

    Returns:
        `dict[int, Any]`: By rank, what the function returned.

    Raises:
        ChildFailedError: A rank failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method(),
    )
    with _signal_handlers_kept():
        results: dict[int, Any] = elastic_launch(config, _call)(dict(os.environ), function, arguments)
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


def _call(environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What each rank does."""
    from torch import distributed
    from torch.distributed.elastic.multiprocessing.errors import record

    os.environ.update(environment)  # the server that forks has that of when it started
    try:
        return record(function)(*arguments)  # tells the parent which error it was
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()  # its threads would now and then abort a process that ends with them


def on_two_ranks(bench: Bench) -> dict[int, tuple[str, list[list[float]]]]:
    """Train on two ranks: by rank, the identity's digest and the sample batch's values."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        pickle.dumps(bench)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        pytest.fail(
            f"What the fixtures return cannot be sent to another process ({error}). Define the provider's class at "
            "the top of a module, or return its registered name.",
            pytrace=False,
        )
    try:
        return launch(_on_one_rank, bench)
    except ChildFailedError as error:
        rank, message = first_failure(error)
        pytest.fail(f"Rank {rank} of two failed: {message}", pytrace=False)


def first_failure(error: Any) -> tuple[int, str]:
    """Of a `ChildFailedError`, the rank that failed first and its error's message."""
    _, failure = error.get_first_failure()
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    return failure.local_rank, str(message)


def _on_one_rank(bench: Bench) -> tuple[str, list[list[float]]]:
    directory = bench.directory / f"rank{os.environ['RANK']}"
    attached = bench.using(directory=directory).attach(ddp_backend="gloo")
    values = [row.tolist() for row in attached.ask_rows(attached.batch)]
    attached.trainer.train()
    return attached.provider.identity().digest, values
