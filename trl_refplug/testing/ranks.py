"""Running a function on two ranks: two real processes that communicate with gloo, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from trl_refplug.testing.bench import Bench


_PRELOADED = ["trl_refplug.testing.bench", "trl_refplug.trainers", "datasets", "peft"]


def start_method() -> str:
    """
    `forkserver` if the platform has it: then TRL is imported once, by one process that all ranks are forked from.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    return "forkserver"


class RankFailedError(Exception):
    """
    The function raised an exception on one of the ranks, or a rank's process died.

    Args:
        rank (`int` or `None`): The rank that failed first; `None` if its process could not say so.
        message (`str`): Its error.
    """

    def __init__(self, rank: int | None, message: str) -> None:
        super().__init__(rank, message)
        self.rank = rank
        self.message = message

    def __str__(self) -> str:
        return f"Rank {'?' if self.rank is None else self.rank} of two failed: {self.message}"


def launch(function: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """
    Call a function on two ranks, as torchrun would run a script: the environment variables are set, and if one rank
    fails, the other one is stopped.

    Returns:
        `dict[int, Any]`: What the function returned on each rank.

    Raises:
        RankFailedError: A rank failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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
    with TemporaryDirectory() as failures, _signal_handlers_kept():
        try:
            results: dict[int, Any] = elastic_launch(config, _call)(dict(os.environ), failures, function, arguments)
        except ChildFailedError as error:
            messages = sorted(Path(failures).iterdir(), key=lambda file: file.stat().st_mtime_ns)
            if not messages:
                raise RankFailedError(None, str(error)) from None
            raise RankFailedError(int(messages[0].name), messages[0].read_text(encoding="utf-8")) from None
    return results


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """
    Restore the signal handlers. torch's launcher leaves its own behind, with which Ctrl-C would not raise a
    KeyboardInterrupt in the tests that pytest runs next.
    """
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _call(environment: Mapping[str, str], failures: str, function: Callable[..., Any], arguments: Any) -> Any:
    """Call the function. This is what runs on each rank."""
    from torch import distributed

    os.environ.update(environment)  # the fork server still has the environment of the time when it started
    try:
        result = function(*arguments)
    except Exception as error:
        # Written now: once this process ends, its connections close, and the other rank fails as well.
        Path(failures, os.environ["RANK"]).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()  # else its threads now and then abort the process as it exits
    return result


def on_two_ranks(bench: Bench) -> dict[int, tuple[str, list[list[float]]]]:
    """Train on two ranks. Returns, for each rank, the digest of the identity and the values of the sample batch."""
    if sys.platform == "win32":
        pytest.skip("torch for Windows is built without what its ranks meet through")
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
    except RankFailedError as error:
        pytest.fail(str(error), pytrace=False)


def _on_one_rank(bench: Bench) -> tuple[str, list[list[float]]]:
    directory = bench.directory / f"rank{os.environ['RANK']}"
    attached = bench.using(directory=directory).attach(ddp_backend="gloo")
    values = [row.tolist() for row in attached.ask_rows(attached.batch)]
    attached.trainer.train()
    return attached.provider.identity().digest, values
