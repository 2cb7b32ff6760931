"""
Checks that answer everyday mistakes in one line, before anything slow begins.

Nothing here imports torch or TRL. All commands that train or load a model share these checks.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryFile

from trl_refplug.cli.given_flags import GivenFlags
from trl_refplug.data_files import LOADERS, check_data_file
from trl_refplug.errors import ConfigurationError
from trl_refplug.runtime.names import check_name


_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def check_run(method: str, given: GivenFlags) -> None:
    """
    Check what a training command names: the model, the data, the output directory, the checkpoint and the rewards.

    Raises:
        ConfigurationError: One of them is missing, does not exist, or is not what the method needs.
    """
    if given.model is None:
        raise ConfigurationError("No model: pass --model_name_or_path with a directory or hub id.")
    check_name("--model_name_or_path", given.model)
    conversational = False
    if not given.mixture:
        if given.dataset is None:
            raise ConfigurationError("No data: pass --dataset_name with a file, a directory or a hub id.")
        conversational = _check_dataset(method, given.dataset, evaluates=given.evaluates)
    if method in ("grpo", "rloo") and not given.reward:
        raise ConfigurationError(
            f"No reward: {method} needs --reward_funcs with the dotted name of a Python function "
            "(package.module.function) or one of TRL's (think_format_reward), or --reward_model_name_or_path."
        )
    if conversational:
        check_chat_template("--model_name_or_path", given.model)
    if given.checkpoint is not None:
        _check_checkpoint(given.checkpoint)
    if given.output_dir is not None:
        check_writable("--output_dir", Path(given.output_dir))


def _check_dataset(method: str, name: str, *, evaluates: bool) -> bool:
    """Check a data set. Returns whether its rows are known to be conversations."""
    path = Path(name)
    if not path.is_file():
        check_name("--dataset_name", name, "dataset")
        files = sorted(path.glob("*.jsonl")) if path.is_dir() and not (path / "README.md").exists() else []
        if path.is_dir() and not any(path.iterdir()):
            raise ConfigurationError(f"--dataset_name {name}: this directory is empty.")
        found = [check_data_file(file, method) for file in files]  # all of them, not only up to the first that is true
        return any(found)
    if path.suffix not in LOADERS:
        raise ConfigurationError(f"--dataset_name {name}: expected a file that ends in {', '.join(LOADERS)}.")
    if evaluates:
        raise ConfigurationError(
            f"--dataset_name {name} is a single file, which has no evaluation split. Pass a directory with one file "
            "for each split (train.jsonl and test.jsonl, say), or --eval_strategy no."
        )
    return check_data_file(path, method)


def check_chat_template(option: str, model: str) -> None:
    """
    Check that a model's tokenizer has a chat template, as far as its directory says so.

    Raises:
        ConfigurationError: It has none.
    """
    directory = Path(model)
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a model of the hub, or one that says so when it is loaded
    if not settings.get("chat_template") and not any((directory / file).exists() for file in _TEMPLATE_FILES):
        raise ConfigurationError(no_chat_template(f"{option} {model}"))


def no_chat_template(what: str) -> str:
    """The message for data of conversations and a model without chat template."""
    return (
        f"{what}: the data are conversations, and the tokenizer of this model has no chat template. Use a chat model "
        "(often named Instruct), set `tokenizer.chat_template` and save the tokenizer, or use data of plain texts."
    )


def _check_checkpoint(name: str) -> None:
    path = Path(name)
    if name.lower() in ("true", "false"):
        return
    if not path.is_dir():
        beside = [entry.name for entry in path.parent.glob("checkpoint-*")] if path.parent.is_dir() else []
        there = f" There are {', '.join(sorted(beside))}." if beside else ""
        raise ConfigurationError(f"--resume_from_checkpoint {name}: there is no such directory.{there}")
    if not (path / "trainer_state.json").is_file():
        inside = sorted(entry.name for entry in path.glob("checkpoint-*"))
        there = f" It contains {', '.join(inside)}: name one of them." if inside else ""
        raise ConfigurationError(
            f"--resume_from_checkpoint {name}: this is no checkpoint of a training run (it has no "
            f"trainer_state.json).{there}"
        )


def check_writable(option: str, path: Path) -> None:
    """
    Check that a directory can be made or written to. Nothing is created.

    Raises:
        ConfigurationError: It cannot.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigurationError(f"{option} {path} cannot be written to: {there} is a file.")
    try:
        TemporaryFile(dir=there).close()  # it has no name, so that nothing is left of it
    except OSError as error:
        raise ConfigurationError(f"{option} {path} cannot be written to: {error.strerror} ({there}).") from None


def check_output(option: str, path: Path) -> None:
    """
    Check that a file or a directory can be written. Nothing is created.

    Raises:
        ConfigurationError: It cannot, or it is a directory with something in it.
    """
    check_writable(option, path.absolute().parent)
    if path.is_dir() and any(path.iterdir()):
        raise ConfigurationError(
            f"{option} {path} is a directory with something in it, which would be mixed with what is written. Name a "
            "new one."
        )
