"""Writes the reference of a checkpoint as an ordinary model or adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trl_refplug.errors import ConfigurationError, did_you_mean
from trl_refplug.provider import STATE_DIRECTORY
from trl_refplug.runtime.files import written_aside


_BESIDE_A_MODEL = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
    "generation_config.json",
)


def export_reference(checkpoint: Path, out: Path) -> str:
    """
    Write the moving reference that `checkpoint` was trained against.

    Args:
        checkpoint (`Path`): A checkpoint of a run with `ref_provider="ema"`, saved on any number of ranks.
        out (`Path`): Directory to write to. It must be empty, or not there yet.

    Returns:
        `str`: What was written, `"model"` or `"adapter"`.

    Raises:
        ConfigurationError: There is no such checkpoint, `out` is in use, or the model's class is not one of
            transformers.
        ReferenceMismatchError: The checkpoint has no such reference, or is damaged.
    """
    directory = checkpoint / STATE_DIRECTORY
    _check_checkpoint(checkpoint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out} exists already and would be mixed with the reference. Name a new directory.")
    from trl_refplug.providers.ema.provider import read_state  # this imports torch

    state = read_state(directory)
    with written_aside(out) as aside:
        if state["kind"] == "adapter":
            shutil.copytree(directory / "adapter", aside)
        else:
            _model(directory, state["architecture"]).save_pretrained(aside)
        for pattern in _BESIDE_A_MODEL:
            for path in checkpoint.glob(pattern):
                shutil.copy(path, aside)
    return str(state["kind"])


def _check_checkpoint(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise ConfigurationError(
            f"{checkpoint}: there is no such directory.{did_you_mean(checkpoint.name, _names_in(checkpoint.parent))}"
        )
    if not (checkpoint / STATE_DIRECTORY).is_dir():
        inside = [name for name in _names_in(checkpoint) if name.startswith("checkpoint-")]
        there = f" It contains {', '.join(inside)}: name one of them." if inside else ""
        raise ConfigurationError(
            f"{checkpoint} has no state of a moving reference ({STATE_DIRECTORY}), so there is nothing to export. "
            f"Name a checkpoint that was written with ref_provider='ema'.{there}"
        )


def _names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []


def _model(directory: Path, architecture: str) -> Any:
    import torch
    import transformers

    from trl_refplug.models.identity import strip_wrappers
    from trl_refplug.providers.ema.tensor_files import TensorReader

    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ConfigurationError(
            f"The reference is a {architecture}, which transformers {transformers.__version__} does not have. Install "
            "the release it was trained with; custom model code cannot be exported."
        )
    config = transformers.AutoConfig.from_pretrained(directory)
    with TensorReader(directory) as reader, torch.no_grad():
        model = model_class._from_config(config)
        tensors = dict(model.named_parameters())
        tensors.update(
            (name, buffer) for name, buffer in model.named_buffers() if strip_wrappers(name) in reader.names
        )
        for name, tensor in tensors.items():
            known = strip_wrappers(name)
            # It is stored in the precision of the average, and written in the one in which it scores.
            tensor.data = reader.whole(known, tuple(tensor.shape)).to(reader.dtypes[known])
        model.tie_weights()
    return model
