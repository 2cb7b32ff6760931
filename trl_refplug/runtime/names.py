"""Whether the name of a model or of a data set leads anywhere: to a directory of this machine, or to the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from trl_refplug.errors import ConfigurationError, did_you_mean


Kind = Literal["model", "dataset"]

_HUB_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_FILES_OF_A_MODEL = ("config.json", "adapter_config.json", "params.json")
_SECONDS_TO_CONNECT = 5.0


def check_name(option: str, name: str, kind: Kind = "model") -> None:
    """
    Check that a model or a data set exists, before a library looks for it, which retries for a minute.

    A name that is not a path on this machine is taken for one of the hub. The hub is asked once.

    Args:
        option (`str`): What the name was given with, for messages.
        name (`str`): A directory (of a data set also a file), or a name on the hub.
        kind (`str`): `"model"` or `"dataset"`.

    Raises:
        ConfigurationError: It is neither here nor on the hub, or the hub cannot be asked.
    """
    path = Path(name)
    if path.exists():
        if kind == "model":
            _check_directory_of_a_model(option, path)
        return
    if "://" in name:
        return
    what = "directory" if kind == "model" else "file or directory"
    problem = f"{option} {name}: there is no such {what}.{did_you_mean(path.name, _beside(path, kind))}"
    looks_like_a_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".jsonl", ".json", ".csv", ".parquet"))
    if looks_like_a_path or not _HUB_ID.fullmatch(name):
        raise ConfigurationError(problem)
    if not _is_cached(name, kind) and (reason := _why_not_on_the_hub(name, kind)):
        raise ConfigurationError(f"{problem} As a name on the hub, {reason}.")


def _check_directory_of_a_model(option: str, path: Path) -> None:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigurationError(f"{option} {path}: this is a file; expected the directory of a model.")
    elif not any((path / file).exists() for file in _FILES_OF_A_MODEL):
        inside = sorted(found.parent.name for file in _FILES_OF_A_MODEL[:2] for found in path.glob(f"*/{file}"))
        hint = f" There are models in it: {', '.join(inside[:5])}." if inside else ""
        raise ConfigurationError(
            f"{option} {path}: no model was saved in this directory (it has no config.json or adapter_config.json)."
            f"{hint}"
        )


def _beside(path: Path, kind: Kind) -> list[str]:
    """The names that could have been meant: what is in the same directory."""
    try:
        return [entry.name for entry in path.parent.iterdir() if kind == "dataset" or entry.is_dir()]
    except OSError:
        return []


def _is_cached(name: str, kind: Kind) -> bool:
    """Whether something of that name was loaded from the hub before, so that the hub may not be needed."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    if (Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir():
        return True
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    return kind == "dataset" and (prepared / name.replace("/", "___")).is_dir()


def _why_not_on_the_hub(name: str, kind: Kind) -> str:
    """Why the hub does not have it, or cannot say; an empty string if it has, or if that is not certain."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS_TO_CONNECT)
    except RepositoryNotFoundError:
        return "it does not exist either, or it is private and needs `hf auth login`"
    except OfflineModeIsEnabled:
        return "it is not in the cache, and HF_HUB_OFFLINE keeps it from being looked for"
    except Exception as error:  # of the library for HTTP, which differs between releases of huggingface_hub
        if "Connect" in type(error).__name__ or isinstance(error, ConnectionError):
            return f"it is not in the cache, and the hub cannot be reached ({error or type(error).__name__})"
        return ""  # loading it will say
    return ""
