"""
The training scripts of TRL, with our classes in the place of TRL's.

They import their classes from `trl` when their functions are called. Running those very functions keeps every flag of
every TRL release, where a copy of the scripts would fall behind.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from trl_refplug.errors import SeamError


PREFIXES = {"dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}  # of TRL's class names
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@contextmanager
def our_classes(method: str) -> Iterator[None]:
    """In `trl`, the names of the method's classes are ours."""
    import trl

    import trl_refplug

    prefix = PREFIXES[method]
    names = [f"{prefix}Config", f"{prefix}Trainer"]
    originals = {name: getattr(trl, name) for name in names}
    for name in names:
        setattr(trl, name, getattr(trl_refplug, f"RefPlug{name}"))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(trl, name, original)


def load(method: str) -> Any:
    """
    The module of the method's script.

    Raises:
        SeamError: It does not take its trainer from `trl` when it is called.
    """
    script = importlib.import_module(f"trl.scripts.{method}")
    # A trainer imported any earlier would be TRL's own: the reference flags would be ignored silently.
    if f"{PREFIXES[method]}Trainer" not in script.main.__code__.co_varnames:
        _raise_unsupported(method)
    return script


def make_parser(method: str) -> Any:
    """
    The script's parser, which knows the reference flags.

    Raises:
        SeamError: It does not.
    """
    import trl_refplug

    with our_classes(method):
        parser = load(method).make_parser(prog=f"trl-refplug {method}")
    if getattr(trl_refplug, f"RefPlug{PREFIXES[method]}Config") not in parser.dataclass_types:
        _raise_unsupported(method)
    return parser


def use_file(script_args: Any, mixture: Any) -> None:
    """The scripts load directories and hub ids by name; a file they take as the one member of a mixture."""
    from trl.scripts.utils import DatasetConfig

    path = Path(script_args.dataset_name)
    mixture.datasets = [DatasetConfig(path=LOADERS[path.suffix], data_files=str(path), split="train")]
    mixture.streaming = script_args.dataset_streaming
    script_args.dataset_name = None


def _raise_unsupported(method: str) -> NoReturn:
    import trl

    raise SeamError(
        f"`trl-refplug {method}` runs the training script of TRL, which TRL {trl.__version__} has changed. Install "
        "another release of TRL or of trl-refplug, or use the trainer classes in a script of your own."
    )
