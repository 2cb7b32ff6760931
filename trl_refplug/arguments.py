"""The flags that select a reference. This module does not import TRL, so that `--help` answers at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_refplug.errors import ConfigurationError, OptionsError, did_you_mean


_CHECKS = ("error", "warn", "off")


@dataclass
class ReferenceArguments:
    r"""
    Where the reference's log-probabilities come from. Inherited by all `RefPlug*Config` classes; usable on its own
    with [`~trl.TrlParser`], YAML files and the command line.

    Parameters:
        ref_provider (`str`, *optional*, defaults to `"auto"`):
            Name of the reference provider. `trl-refplug plugins` lists those installed. `"auto"` is what TRL's own
            flags mean: `"cached"` with `precompute_ref_log_probs`, `"ema"` with `sync_ref_model`, `"frozen"` for a
            `ref_model`; else `"adapter"` for a PEFT policy (adapters disabled, or a frozen copy of the adapter it
            comes with) and `"frozen"` for any other.
        ref_provider_kwargs (`dict` or `str`, *optional*):
            Options of the provider, as a dictionary or as JSON text. They end in logs and checkpoints, so they never
            carry secrets: a provider takes the name of an environment variable instead.
        ref_check (`str`, *optional*, defaults to `"error"`):
            What to do if the first reference log-probs of training differ from the declared reference's: `"error"`,
            `"warn"` or `"off"`.
        ref_prefetch (`int`, *optional*, defaults to `2`):
            How many batches ahead of the policy the reference is asked, by DPO and KTO and where the provider can
            answer while the policy works (another device or machine). 1 hides an answer that takes no longer than a
            step; 2 also where one batch takes longer than the next. With any number above 0, GRPO and RLOO compute
            their rewards while the reference answers. 0 asks when the answer is needed.
        ref_monitor_steps (`int`, *optional*, defaults to `0`):
            How many optimizer steps from one measurement of the policy's distance from its reference to the next, in
            the logs as `ref/kl`, `ref/kl_k3`, `ref/kl_p99` and `ref/kl_max`. Training does not change with it. Works
            with `beta=0` too, where the selected reference is then built for this alone. 0 measures nothing.
    """

    ref_provider: str = field(
        default="auto",
        metadata={
            "help": "Name of the reference provider; `trl-refplug plugins` lists those installed. `auto` is what "
            "TRL's own flags mean: `cached` with `precompute_ref_log_probs`, `ema` with `sync_ref_model`; else "
            "`adapter` for a PEFT policy (adapters disabled, or a frozen copy of the adapter it comes with) and "
            "`frozen` for any other."
        },
    )
    ref_provider_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the provider, as JSON text on the command line. Never put a secret here."},
    )
    ref_check: str = field(
        default="error",
        metadata={
            "help": "What to do if the first reference log-probs of training differ from the declared reference's: "
            "`error`, `warn` or `off`.",
            "choices": list(_CHECKS),
        },
    )
    ref_prefetch: int = field(
        default=2,
        metadata={
            "help": "How many batches ahead of the policy the reference is asked (DPO and KTO), where the provider "
            "can answer while the policy works: on another device or machine. GRPO and RLOO compute their rewards "
            "meanwhile. 0 asks when the answer is needed."
        },
    )
    ref_monitor_steps: int = field(
        default=0,
        metadata={
            "help": "How many optimizer steps from one measurement of the policy's distance from its reference to the "
            "next, in the logs as `ref/kl`, `ref/kl_k3`, `ref/kl_p99` and `ref/kl_max`. Training does not change with "
            "it. Works with `beta=0` too. 0 measures nothing."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.ref_provider_kwargs, str):
            self.ref_provider_kwargs = _parse_json(self.ref_provider_kwargs)
        if self.ref_provider_kwargs is not None and not isinstance(self.ref_provider_kwargs, Mapping):
            raise OptionsError(
                "`ref_provider_kwargs` must be a dictionary (a JSON object on the command line), got "
                f"{type(self.ref_provider_kwargs).__name__}."
            )
        if self.ref_check not in _CHECKS:
            raise ConfigurationError(
                f"`ref_check` must be one of {', '.join(_CHECKS)}, got {self.ref_check!r}."
                f"{did_you_mean(self.ref_check, _CHECKS)}"
            )
        if not isinstance(self.ref_prefetch, int) or self.ref_prefetch < 0:
            raise ConfigurationError(
                f"`ref_prefetch` must be a number of batches, 0 or more, got {self.ref_prefetch!r}. 0 asks the "
                "reference only when its answer is needed."
            )
        if not isinstance(self.ref_monitor_steps, int) or self.ref_monitor_steps < 0:
            raise ConfigurationError(
                f"`ref_monitor_steps` must be a number of optimizer steps, 0 or more, got {self.ref_monitor_steps!r}. "
                "0 measures nothing."
            )
        # The configurations of TRL have a __post_init__ of their own further along the MRO.
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    @classmethod
    def of(cls, args: Any) -> ReferenceArguments:
        """
        The reference flags of any training arguments. For one of TRL's own configurations, they are the defaults.
        """
        if isinstance(args, cls):
            return args
        return cls()


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionsError(
            f"`ref_provider_kwargs` is not valid JSON ({error.msg} at column {error.colno}): {text}\n"
            'Write it as, for example, \'{"model": "Qwen/Qwen3-0.6B"}\'.'
        ) from None
