"""Load a model by name: a plain model, or a PEFT adapter together with the base model that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trl_refplug.errors import ConfigurationError
from trl_refplug.runtime.names import check_name


def load_pretrained(model: str, loading: Mapping[str, Any]) -> nn.Module:
    """
    Load the model that `model` names, in the way TRL loads a reference.

    Args:
        model (`str`): Hub id or path of a model, or of a PEFT adapter that names its base model.
        loading (`Mapping[str, Any]`): Keyword arguments of `from_pretrained`. A `revision` belongs to `model`; the
            base model of an adapter is loaded at its default revision.

    Returns:
        `nn.Module`: The model; for an adapter, a `PeftModel` in which the adapter is active.
    """
    from trl.trainer.utils import create_model_from_path

    check_name("model", model)
    revision = loading.get("revision")
    base = base_of_adapter(model, revision)
    if base is None:
        loaded: nn.Module = create_model_from_path(model, **loading)
        return loaded
    from peft import PeftModel

    inner = create_model_from_path(base, **{name: value for name, value in loading.items() if name != "revision"})
    adapted: nn.Module = PeftModel.from_pretrained(inner, model, revision=revision)
    return adapted


def base_of_adapter(model: str, revision: str | None = None) -> str | None:
    """
    The base model that a PEFT adapter names.

    Args:
        model (`str`): Hub id or path of an adapter, or of anything else.
        revision (`str`, *optional*): Revision of a hub id.

    Returns:
        `str` or `None`: Hub id or path of the base model; `None` where `model` is not an adapter.

    Raises:
        ConfigurationError: The adapter does not name its base model.
    """
    from peft import PeftConfig
    from transformers.utils import cached_file

    if Path(model).is_dir() and (Path(model) / "config.json").exists():
        return None  # this is a model, even if an adapter was saved beside it
    try:
        if not cached_file(
            model, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        ):
            return None
        base: str | None = PeftConfig.from_pretrained(model, revision=revision).base_model_name_or_path
    except (OSError, ValueError, TypeError):  # whoever loads it as a model will be told what is wrong
        return None
    if base is None:
        raise ConfigurationError(
            f"The adapter {model!r} does not name its base model. Name the base, and put the adapter on it: "
            "`trl-refplug serve BASE --adapter ADAPTER`, or merge the two and name the result."
        )
    return base
