"""What a training command launches in every process: TRL's script, or a task in the place of its training."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from trl_refplug.cli.tasks import Task, decode
from trl_refplug.cli.trl_scripts import PREFIXES, load, make_parser, our_classes, use_file
from trl_refplug.errors import RefPlugError


class _DoneError(Exception):
    """Ends TRL's script where it would train."""


def _stop_as_training_begins() -> Any:
    """A callback that ends a `train()` when the policy is sharded and what fills a store has filled it."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise _DoneError

    return Stop()


@contextmanager
def _instead_of_training(method: str, task: Task) -> Iterator[None]:
    import trl

    def run(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        if self.ref_model.provider.fills_as_training_begins:
            with suppress(_DoneError):
                self.add_callback(_stop_as_training_begins())
                trainer_class.train(self, *args, **kwargs)
        done = task.run(self)
        if self.is_world_process_zero():
            print(done)
        raise _DoneError

    name = f"{PREFIXES[method]}Trainer"
    trainer_class = getattr(trl, name)
    setattr(trl, name, type(name, (trainer_class,), {"train": run}))
    try:
        yield
    except _DoneError:
        pass
    finally:
        setattr(trl, name, trainer_class)


def train(method: str, arguments: Sequence[str], task: Task | None = None) -> None:
    """TRL's script for `method`, with the flags that it understands, or with `task` where it would train."""
    *parsed, _ = make_parser(method).parse_args_and_config(list(arguments), return_remaining_strings=True)
    script_args, training_args, model_args, mixture = parsed
    if script_args.dataset_name and not mixture.datasets and Path(script_args.dataset_name).is_file():
        use_file(script_args, mixture)
    if task is not None:
        task.configure(training_args)
    with our_classes(method), nullcontext() if task is None else _instead_of_training(method, task):
        load(method).main(script_args, training_args, model_args, mixture)

    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads would now and then abort a process that ends with them


def _main() -> None:
    task = decode(sys.argv[1])
    method, *arguments = sys.argv[1:] if task is None else sys.argv[2:]
    try:
        train(method, arguments, task)
    except RefPlugError as error:
        if os.environ.get("TRL_REFPLUG_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    # Python put this directory first on the path, where modules of these names do not belong.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    _main()
