"""Writes the reference of a checkpoint as an ordinary model or adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trl_refplug.errors import ConfigurationError
from trl_refplug.provider import STATE_DIRECTORY


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
        ConfigurationError: `out` is not empty, or the model's class is not one of transformers.
        ReferenceMismatchError: The checkpoint has no such reference, or is damaged.
    """
    from trl_refplug.providers.ema.provider import read_state

    directory = checkpoint / STATE_DIRECTORY
    state = read_state(directory)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out} exists already and would be mixed with the reference. Name a new directory.")
    out.mkdir(parents=True, exist_ok=True)
    if state["kind"] == "adapter":
        shutil.copytree(directory / "adapter", out, dirs_exist_ok=True)
    else:
        _load_model(directory, state["architecture"]).save_pretrained(out)
    for pattern in _BESIDE_A_MODEL:
        for path in checkpoint.glob(pattern):
            shutil.copy(path, out)
    return str(state["kind"])


def _load_model(directory: Path, architecture: str) -> Any:
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
