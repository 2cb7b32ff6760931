"""
The flags of a training command that can be checked at once, before TRL is imported, which takes seconds.

TRL's own parser reads all flags afterwards. What is not recognized here is left to it.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError


_REFERENCE_FLAGS = tuple(field.name for field in fields(ReferenceArguments))
_TRAINING_FLAGS = (
    "config",
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "resume_from_checkpoint",
    "eval_strategy",
    "reward_model_name_or_path",
)


@dataclass(frozen=True)
class GivenFlags:
    """
    What a training command was given. `None` stands for a flag that was not given.

    Args:
        reference ([`ReferenceArguments`]): The reference flags.
        model, dataset, output_dir, checkpoint (`str`, *optional*): The values of `--model_name_or_path`,
            `--dataset_name`, `--output_dir` and `--resume_from_checkpoint`.
        mixture (`bool`): Whether a `--config` file names the data sets.
        reward (`bool`): Whether a reward function or a reward model is named.
        use_peft (`bool`): Whether the policy gets an adapter.
        evaluates (`bool`): Whether there is an evaluation.
    """

    reference: ReferenceArguments
    model: str | None
    dataset: str | None
    output_dir: str | None
    checkpoint: str | None
    mixture: bool
    reward: bool
    use_peft: bool
    evaluates: bool


def read_flags(arguments: Sequence[str]) -> GivenFlags:
    """
    Read the flags from the arguments of a training command, and from its `--config` file.

    Raises:
        ConfigurationError: A reference flag has a wrong value, or the `--config` file cannot be read.
    """
    parser = ArgumentParser(add_help=False, argument_default=None)
    parser.error = refuse  # type: ignore[method-assign]
    for name in (*_REFERENCE_FLAGS, *_TRAINING_FLAGS):
        parser.add_argument(*_spellings(name))
    parser.add_argument(*_spellings("reward_funcs"), nargs="*")
    parser.add_argument(*_spellings("use_peft"), nargs="?", const="true")
    found, _ = parser.parse_known_args(list(arguments))
    values = _config_file(found.config) if found.config else {}
    values |= {name: value for name, value in vars(found).items() if value is not None}
    flags = {name: values[name] for name in _REFERENCE_FLAGS if values.get(name) is not None}
    if isinstance(flags.get("ref_prefetch"), str):
        try:
            flags["ref_prefetch"] = int(flags["ref_prefetch"])
        except ValueError:
            refuse(f"--ref_prefetch {flags['ref_prefetch']}: expected a number of batches, 0 or more")
    return GivenFlags(
        reference=ReferenceArguments(**flags),
        model=_text(values, "model_name_or_path"),
        dataset=_text(values, "dataset_name"),
        output_dir=_text(values, "output_dir"),
        checkpoint=_text(values, "resume_from_checkpoint"),
        mixture=bool(values.get("datasets")),
        reward=bool(values.get("reward_funcs") or values.get("reward_model_name_or_path")),
        use_peft=str(values.get("use_peft", "false")).lower() in ("true", "1", "yes", "y", "t"),
        evaluates=values.get("eval_strategy") not in (None, False, "no"),  # YAML reads `no` as false
    )


def refuse(message: str) -> NoReturn:
    """Takes the place of `ArgumentParser.error`, which would print a usage of many lines before the message."""
    raise ConfigurationError(f"{message[:1].upper()}{message[1:].rstrip('.')}.")


def _spellings(name: str) -> list[str]:
    """A flag with underscores and with dashes, as TRL's parser takes it."""
    return sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)


def _text(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    return None if value is None else str(value)


def _config_file(path: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--config {path} cannot be read: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {path}: found {type(values).__name__}; expected flags and their values.")
    return values
