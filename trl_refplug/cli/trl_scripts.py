"""
TRL's own training scripts, with our classes in the place of TRL's.

The scripts import their classes from `trl` when their functions are called, so they use whatever these names stand for
then. A copy of the scripts would miss the flags of later TRL releases; running TRL's own functions misses none.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from trl_refplug.data_files import LOADERS
from trl_refplug.errors import SeamError


PREFIXES = {"dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}  # prefixes of TRL's class names


@contextmanager
def our_classes(method: str) -> Iterator[None]:
    """Inside this context, the method's class names in `trl` stand for our classes."""
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
    Import the module of the method's script.

    Raises:
        SeamError: The script does not import its trainer from `trl` inside its `main` function.
    """
    script = importlib.import_module(f"trl.scripts.{method}")
    # If it imported its trainer earlier, it would get TRL's own, which would silently ignore the reference flags.
    if f"{PREFIXES[method]}Trainer" not in script.main.__code__.co_varnames:
        _raise_unsupported(method)
    return script


def make_parser(method: str) -> Any:
    """
    Make the script's parser, with the reference flags.

    Raises:
        SeamError: The script's parser does not know the reference flags.
    """
    import trl_refplug

    with our_classes(method):
        parser = load(method).make_parser(prog=f"trl-refplug {method}")
    if getattr(trl_refplug, f"RefPlug{PREFIXES[method]}Config") not in parser.dataclass_types:
        _raise_unsupported(method)
    return parser


def use_file(script_args: Any, mixture: Any) -> None:
    """
    Make the scripts load a single file.

    They load only directories and hub ids by name. A file has to be given as the only member of a data set mixture.
    """
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
