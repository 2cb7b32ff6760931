"""The script that training commands launch in every process. It runs TRL's script, or a task instead of training."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from trl_refplug.cli.common import show_own_warnings_in_one_line
from trl_refplug.cli.failures import INTERRUPTED, LAUNCHED_DIFFERS, concerns_data, report
from trl_refplug.cli.tasks import Task, decode
from trl_refplug.cli.trl_scripts import PREFIXES, load, make_parser, our_classes, use_file
from trl_refplug.data_files import check_data_file


class _DoneError(Exception):
    """Is raised to end TRL's script where it would train."""


def _stop_as_training_begins() -> Any:
    """Make a callback that ends `train()` as training begins. By then a sharded policy's store has been filled."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise _DoneError

    return Stop()


@contextmanager
def _instead_of_training(method: str, task: Task) -> Iterator[None]:
    """Inside this context, the `train()` of the method's trainer runs the task and ends TRL's script."""
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
    """
    Run TRL's training script.

    Args:
        method (`str`): `dpo`, `kto`, `grpo` or `rloo`.
        arguments (`Sequence[str]`): Flags that the script understands.
        task (`Task`, *optional*): What to do instead of training.
    """
    *parsed, _ = make_parser(method).parse_args_and_config(list(arguments), return_remaining_strings=True)
    script_args, training_args, model_args, mixture = parsed
    file = None
    if script_args.dataset_name and not mixture.datasets and Path(script_args.dataset_name).is_file():
        file = Path(script_args.dataset_name)
        use_file(script_args, mixture)
    if task is not None:
        task.configure(training_args)
    output_dir = Path(training_args.output_dir)
    existed = output_dir.exists()
    try:
        with our_classes(method), nullcontext() if task is None else _instead_of_training(method, task):
            load(method).main(script_args, training_args, model_args, mixture)
    except Exception as error:
        if file is not None and concerns_data(error):
            check_data_file(file, method, None)  # all rows, to say which one is wrong
        raise
    finally:
        if not existed:
            with suppress(OSError):  # it is not empty, so it is kept
                output_dir.rmdir()

    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        # If its threads are still running when the process ends, they sometimes abort the process.
        distributed.destroy_process_group()


def _main() -> None:
    show_own_warnings_in_one_line()
    task = decode(sys.argv[1])
    method, *arguments = sys.argv[1:] if task is None else sys.argv[2:]
    try:
        train(method, arguments, task)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        error = task.explain(error) if task is not None else error
        status = report(error)
        differs = task is not None and task.means_difference(error)
        sys.exit(LAUNCHED_DIFFERS if differs else status)


if __name__ == "__main__":
    # Python puts the directory of a script first on the path. Modules of other packages must not be looked up here.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    _main()
