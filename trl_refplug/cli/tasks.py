"""
What a training command can do instead of training.

A task gets the trainer that the command builds, which knows every row exactly as training would ask for it. The task
is passed as JSON text to the processes that `accelerate launch` starts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl_refplug.errors import ConfigurationError, MissingRowError, ReferenceMismatchError
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import VerifiesStoredRows
from trl_refplug.runtime.files import written_aside


@dataclass(frozen=True)
class Task(ABC):
    """Something to do with a trainer whose reference provider answers from a store."""

    name: ClassVar[str]

    def configure(self, training_args: Any) -> None:
        """
        Set the reference provider and the options that the task needs.

        Raises:
            ConfigurationError: `training_args` select a provider that has no store.
        """
        name = training_args.ref_provider
        stored = plugin_manager().able("stored")
        if name not in ("auto", *stored):
            raise ConfigurationError(
                f"`trl-refplug {self.name}` needs the store of --ref_provider {' or '.join(stored)}; found "
                f"--ref_provider {name}. To store what this provider answers, make it the source: --ref_provider "
                f'{stored[0]} --ref_provider_kwargs \'{{"source": "{name}"}}\'.'
            )
        training_args.ref_provider = stored[0] if name == "auto" else name
        training_args.ref_provider_kwargs = {**(training_args.ref_provider_kwargs or {}), **self._options()}

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The options of the provider that the task sets."""

    @abstractmethod
    def run(self, trainer: Any) -> str:
        """Do the task. This is called in every process, and returns the text to print."""

    def explain(self, error: Exception) -> Exception:
        """The error that a user of this command should see in the place of `error`."""
        return error

    def means_difference(self, error: Exception) -> bool:
        """Whether this error says that what the command compared differs, and not that it cannot be done."""
        return False

    def encode(self) -> str:
        """The task as one argument of a command line. [`decode`] reads it."""
        return json.dumps({"task": self.name, **asdict(self)})


def _rows_are_missing(error: Exception, path: str) -> Exception:
    """A missing row, as a command that reads a store should tell of it."""
    if not isinstance(error, MissingRowError):
        return error
    found = str(error).partition(";")[0].partition(". ")[0]
    return MissingRowError(
        f"{found}. Either the store was filled for another model, other data or another precision, or it is not "
        f"complete: `trl-refplug precompute` with the same training command and --ref_provider_kwargs "
        f"'{json.dumps({'path': path})}' scores what is missing."
    )


@dataclass(frozen=True)
class Precompute(Task):
    """Score the rows of the run that are not in the store yet."""

    name = "precompute"

    def _options(self) -> dict[str, Any]:
        return {"fill": "ahead"}

    def run(self, trainer: Any) -> str:
        return f"All rows of this run are in {trainer.ref_model.provider.metadata()['path']}."


@dataclass(frozen=True)
class Verify(Task):
    """Score a sample of the rows that a store holds again, and compare."""

    name = "store verify"
    path: str
    sample: int

    def _options(self) -> dict[str, Any]:
        return {"path": self.path, "fill": "never", "verify": self.sample}

    def explain(self, error: Exception) -> Exception:
        return _rows_are_missing(error, self.path)

    def means_difference(self, error: Exception) -> bool:
        return isinstance(error, ReferenceMismatchError)

    def run(self, trainer: Any) -> str:
        provider = trainer.ref_model.provider
        check = provider.sample_check if isinstance(provider, VerifiesStoredRows) else None
        if check is None:
            raise ConfigurationError(
                f"None of the rows in {self.path} could be scored again: this run's rows are not known beforehand, or "
                "its model is sharded."
            )
        return (
            f"{check.rows:,} rows scored again: per token they differ by {check.largest:.2g} nats at most, by "
            f"{check.mean:.2g} on average"
        )


@dataclass(frozen=True)
class Export(Task):
    """Write the data set together with the log-probs of its rows."""

    name = "store export"
    path: str
    output: str
    split: str

    WRITERS: ClassVar[dict[str, str]] = {".parquet": "to_parquet", ".jsonl": "to_json", ".csv": "to_csv"}

    def __post_init__(self) -> None:
        suffix = Path(self.output).suffix
        if suffix and suffix not in self.WRITERS:
            raise ConfigurationError(
                f"Found output {self.output!r}; expected a file that ends in {', '.join(self.WRITERS)}, or a "
                "directory for `datasets.load_from_disk`."
            )

    def _options(self) -> dict[str, Any]:
        return {"path": self.path, "fill": "never"}

    def explain(self, error: Exception) -> Exception:
        return _rows_are_missing(error, self.path)

    def run(self, trainer: Any) -> str:
        from trl_refplug.trainers.reference_columns import reference_columns

        if not trainer.is_world_process_zero():
            return ""
        table = reference_columns(trainer, self.split)
        with written_aside(Path(self.output)) as path:
            getattr(table, self.WRITERS.get(path.suffix, "save_to_disk"))(str(path))
        columns = [name for name in table.column_names if name.startswith("ref_")]
        return f"{len(table):,} rows with {' and '.join(columns)} in {self.output}"


_TASKS: dict[str, type[Task]] = {task.name: task for task in (Precompute, Verify, Export)}


def decode(argument: str) -> Task | None:
    """The task that an argument of a command line stands for, or `None` if it is an ordinary argument."""
    if not argument.startswith("{"):
        return None
    values = json.loads(argument)
    return _TASKS[values.pop("task")](**values)
