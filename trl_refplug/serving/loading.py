"""
Loading the model that a server serves: a base model, or a PEFT adapter together with its base model.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, cast

import torch
from torch import nn

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.modes import stay_in_evaluation_mode
from trl_refplug.models.pretrained import base_of_adapter
from trl_refplug.serving.engine import Engine


logger = logging.getLogger("trl_refplug")


def load_engine(
    model: str,
    *,
    adapter: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    scoring: Literal["exact", "packed"] = "packed",
    token_budget: int | None = None,
) -> Engine:
    """
    Load a model and make it ready to score.

    Args:
        model (`str`): Hub id or path of a model, or of a PEFT adapter that names its base.
        adapter (`str`, *optional*): Hub id or path of an adapter to put on `model`.
        dtype (`str`): Data type of the weights. `auto` is the one in which they are stored.
        device (`str`, *optional*): By default an accelerator if there is one, and otherwise the CPU.
        scoring (`str`), token_budget (`int`, *optional*): See [`Engine`].

    Raises:
        ConfigurationError: There is no such model, or it cannot be loaded with these options.
    """
    base = None if adapter else base_of_adapter(model)
    path, adapter = (base, model) if base else (model, adapter)
    try:
        loaded = _load_model(path, adapter, dtype).to(device or _default_device())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        what = f"{path!r} with adapter {adapter!r}" if adapter else repr(path)
        raise ConfigurationError(f"Cannot serve {what}: {error}") from error
    stay_in_evaluation_mode(loaded)
    loaded.requires_grad_(False)
    return Engine(
        loaded, path, scoring=scoring, token_budget=token_budget, tokenizer=_load_tokenizer(path), adapter=adapter
    )


def _load_model(path: str, adapter: str | None, dtype: str) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chosen: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, trust_remote_code=False)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return cast(nn.Module, model)


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # many libraries can fail here, and scoring needs no tokenizer
        logger.warning(
            "%s is served without a tokenizer, so clients cannot check theirs against it: %s",
            path,
            " ".join(f"{type(error).__name__}: {error}".split()),
        )
        return None


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"
