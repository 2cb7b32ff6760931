"""Files of training data in TRL's formats: the pairs of one, and what is wrong with one, by line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trl_refplug.errors import ConfigurationError


COLUMNS = ("prompt", "chosen", "rejected")
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # of `datasets`, by suffix
_CHECKED_ROWS = 1000
_LARGEST_JSON = 64 * 2**20  # bytes


@dataclass(frozen=True)
class DataFormat:
    """
    What the rows of a data set must have.

    Args:
        description (`str`): What is expected, for messages.
        alternatives (`tuple[frozenset[str], ...]`): Sets of columns. A row must have all columns of one of them.
    """

    description: str
    alternatives: tuple[frozenset[str], ...]

    def problem(self, row: Any) -> str | None:
        """What was found instead of a row of this format; `None` if the row is fine."""
        if not isinstance(row, dict):
            return type(row).__name__
        if problem := self.problem_of_columns(row):
            return problem
        texts = {name: row[name] for name in (*COLUMNS, "completion") if name in row}
        if len({type(value) for value in texts.values()}) > 1 or not all(
            isinstance(value, (str, list)) for value in texts.values()
        ):
            return ", ".join(f"{name} of type {type(value).__name__}" for name, value in texts.items())
        empty = next((name for name, value in texts.items() if value == []), None)
        return f"an empty list as {empty}" if empty else None

    def problem_of_columns(self, columns: Iterable[str]) -> str | None:
        """The columns that were found instead of those of this format; `None` if they are fine."""
        names = list(columns)
        if any(alternative <= set(names) for alternative in self.alternatives):
            return None
        return ", ".join(names) or "nothing"


_PAIRS = DataFormat(
    "TRL's preference format, a JSON object with prompt, chosen, rejected, all of them texts or all lists of messages",
    (frozenset(COLUMNS),),
)
_PREFERENCE = DataFormat(
    "TRL's preference format: chosen and rejected, and prompt if they do not contain it, all of them texts or all "
    "lists of messages",
    (frozenset({"chosen", "rejected"}),),
)
_UNPAIRED = DataFormat(
    "TRL's format for KTO: prompt, completion and label, or prompt, chosen and rejected, all of them texts or all "
    "lists of messages (label is true or false)",
    (frozenset({"prompt", "completion", "label"}), frozenset({"chosen", "rejected"})),
)
_PROMPTS = DataFormat("TRL's prompt format: prompt, a text or a list of messages", (frozenset({"prompt"}),))
FORMATS = {"dpo": _PREFERENCE, "kto": _UNPAIRED, "grpo": _PROMPTS, "rloo": _PROMPTS}
"""What the rows of a method's data set must have."""


def read_pairs(path: Path, count: int | None) -> list[dict[str, Any]]:
    """
    The first `count` pairs (`None`: all) of a JSON-lines file. Further columns are left out.

    Returns:
        `list[dict]`: At least one: `prompt`, `chosen` and `rejected`, all texts or all lists of messages.

    Raises:
        ConfigurationError: The file cannot be read, is empty, or a line is no such pair.
    """
    return [{name: pair[name] for name in COLUMNS} for pair in islice(_rows(path, _PAIRS, lines=True), count)] or (
        _raise_empty(path)
    )


def check_data_file(path: Path, method: str, count: int | None = _CHECKED_ROWS) -> bool:
    """
    Check the first `count` rows (`None`: all) of a file that a method is to be trained on.

    Of a `.csv` or `.parquet` file, only the names of the columns are checked.

    Returns:
        `bool`: Whether the rows are conversations, which need a chat template.

    Raises:
        ConfigurationError: The file cannot be read, is empty, or a row is not what the method needs. The message has
            the number of the line.
    """
    expected = FORMATS[method]
    if path.suffix == ".json" and path.is_file() and path.stat().st_size > _LARGEST_JSON:
        return False  # it may be a single array, which would have to be read as a whole
    if LOADERS[path.suffix] != "json":
        if problem := expected.problem_of_columns(_column_names(path)):
            raise ConfigurationError(f"{path}: found {problem}; expected {expected.description}.")
        return False
    rows = list(islice(_rows(path, expected, lines=path.suffix == ".jsonl"), count)) or _raise_empty(path)
    return any(isinstance(value, list) and name in (*COLUMNS, "completion") for name, value in rows[0].items())


def _rows(path: Path, expected: DataFormat, *, lines: bool) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines or, if `lines` is false, maybe of a single JSON array. Each row is checked."""
    try:
        with path.open(encoding="utf-8") as file:
            if not lines and (whole := _whole_array(file.read())) is not None:
                numbered = enumerate(whole, 1)
                for number, row in numbered:
                    yield _checked(row, f"{path}, row {number}", expected)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigurationError(
                        f"{path}, line {number}: not JSON ({error.msg}); expected JSON lines."
                    ) from None
                yield _checked(row, f"{path}, line {number}", expected)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None


def _whole_array(text: str) -> list[Any] | None:
    """The rows of a text that is a single JSON value: an array of rows, or one row."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None  # JSON lines, or a mistake, which is found line by line
    return value if isinstance(value, list) else [value]


def _checked(row: Any, where: str, expected: DataFormat) -> dict[str, Any]:
    if problem := expected.problem(row):
        raise ConfigurationError(f"{where}: found {problem}; expected {expected.description}.")
    checked: dict[str, Any] = row
    return checked


def _column_names(path: Path) -> list[str]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return next(csv.reader(file), None) or _raise_empty(path)
        from pyarrow import ArrowException, parquet

        try:
            return list(parquet.read_schema(path).names)
        except ArrowException as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None


def _raise_empty(path: Path) -> Any:
    raise ConfigurationError(f"{path} is empty; expected at least one row.")
