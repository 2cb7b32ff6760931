"""
The options of the built-in providers, and what each provider can do.

Only this part of a provider is needed to list providers and to check flags. It does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl_refplug.provider import Capabilities


@dataclass(frozen=True)
class FrozenOptions:
    """Options of `frozen`."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or path of the reference. By default the policy exactly as it was passed in.",
            "names": "model",
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Precision of the copy. By default the policy's."}
    )
    quantization_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments of `BitsAndBytesConfig`, to quantize `model` as it loads."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where the copy lives (`cpu`, `cuda:1`). By default where the trainer would put it."},
    )
    scoring: Literal["exact", "packed"] = field(
        default="exact",
        metadata={"help": "`exact`: the trainer's own shapes, bit for bit. `packed`: shared prompts computed once."},
    )


FROZEN_CAPABILITIES = Capabilities(
    local_model=True, temperature=True, multimodal=True, offline=True, accepts_model=True
)


@dataclass(frozen=True)
class AdapterOptions:
    """Options of `adapter`."""

    start: Literal["adapter", "base"] | None = field(
        default=None,
        metadata={
            "help": "`adapter`: a frozen copy of the policy's adapter as it starts. `base`: the model with adapters "
            "disabled. By default `adapter` for a policy that comes with one, `base` for a new one, as TRL does."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Name of another adapter of the policy that is the reference, frozen."}
    )
    scoring: Literal["exact", "packed"] = field(
        default="exact",
        metadata={"help": "`exact`: the trainer's own shapes, bit for bit. `packed`: shared prompts computed once."},
    )


ADAPTER_CAPABILITIES = Capabilities(
    local_model=True, temperature=True, multimodal=True, offline=True, scores_policy=True, needs_peft=True
)


@dataclass(frozen=True)
class CachedOptions:
    """Options of `cached`."""

    path: str | None = field(
        default=None,
        metadata={
            "help": "Directory or fsspec URL of the store, shared by any number of runs. By default "
            "`~/.cache/trl-refplug/log-probs`."
        },
    )
    source: str | None = field(
        default=None,
        metadata={
            "help": "Name of the provider that scores missing rows. By default the policy itself, before it is "
            "trained: no second model.",
            "names": "provider",
            "options": "source_kwargs",
        },
    )
    source_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Options of `source`."})
    fill: Literal["ahead", "lazy", "never"] = field(
        default="ahead",
        metadata={
            "help": "`ahead`: score all missing rows before training. `lazy`: score them when training asks for "
            "them. `never`: a missing row is an error."
        },
    )
    verify: int | None = field(
        default=None,
        metadata={
            "help": "How many stored rows are scored again at the start, to be sure of them. By default 4, and none "
            "where that would take a model or a server that nothing else needs."
        },
    )


CACHED_CAPABILITIES = Capabilities(local_model=True, temperature=True, offline=True, stored=True, accepts_model=True)


_MIXED = ("exact", "factors")  # the averages that mix the policy into the reference (TR-DPO)
_BEMA = ("bema",)


@dataclass(frozen=True)
class EmaOptions:
    """
    Options of `ema`.

    An option whose metadata has `averages` is for these values of `average` alone.
    """

    alpha: float = field(
        default=0.6,
        metadata={
            "help": "Weight of the policy in a sync, from 0 (never moves) to 1 (becomes the policy).",
            "trl_flag": "ref_model_mixup_alpha",
            "averages": _MIXED,
        },
    )
    sync_steps: int = field(
        default=512,
        metadata={
            "help": "Optimizer steps from one sync to the next.",
            "trl_flag": "ref_model_sync_steps",
            "averages": _MIXED,
        },
    )
    start_step: int = field(
        default=0, metadata={"help": "No sync happens before this optimizer step.", "averages": _MIXED}
    )
    master_dtype: Literal["float32", "float64", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Lowest precision in which the average is kept. `bfloat16` saves the masters of a bfloat16 model, "
            "and then a small `alpha` moves nothing."
        },
    )
    master_device: Literal["same", "cpu"] = field(
        default="same", metadata={"help": "Where those masters are: with the reference, or in the host's memory."}
    )
    average: Literal["exact", "factors", "bema"] = field(
        default="exact",
        metadata={
            "help": "`exact`: the average of the weights; with PEFT, of the products BA. `factors`: with PEFT, the "
            "averages of B and of A separately, which is cheaper and another method. `bema`: the bias-corrected "
            "average of TRL's `BEMACallback`, not for PEFT."
        },
    )
    tolerance: float = field(
        default=1e-4,
        metadata={
            "help": "With `exact`, relative error that a sync may make to keep the rank low.",
            "averages": ("exact",),
        },
    )
    max_rank: int | None = field(
        default=None,
        metadata={
            "help": "With `exact`, rank of the reference's adapter. By default 4 times the policy's.",
            "averages": ("exact",),
        },
    )
    update_freq: int = field(
        default=400,
        metadata={
            "help": "With `bema`, optimizer steps from one update of the average to the next.",
            "averages": _BEMA,
        },
    )
    update_after: int = field(
        default=0,
        metadata={
            "help": "With `bema`, the optimizer step whose policy is where the average starts.",
            "averages": _BEMA,
        },
    )
    ema_power: float = field(
        default=0.5,
        metadata={
            "help": "With `bema`, how fast the policy's weight in an update decays: "
            "`(lag + multiplier * step) ** -ema_power`.",
            "averages": _BEMA,
        },
    )
    bias_power: float = field(
        default=0.2,
        metadata={
            "help": "With `bema`, how fast the correction decays: `(lag + multiplier * step) ** -bias_power`.",
            "averages": _BEMA,
        },
    )
    lag: int = field(
        default=10,
        metadata={
            "help": "With `bema`, steps that the average pretends to be older, so that it starts smoothly.",
            "averages": _BEMA,
        },
    )
    multiplier: float = field(
        default=1.0,
        metadata={"help": "With `bema`, by how many steps the average ages in one step.", "averages": _BEMA},
    )
    min_ema_multiplier: float = field(
        default=0.0,
        metadata={"help": "With `bema`, least weight of the policy in an update.", "averages": _BEMA},
    )
    ref_model_update_freq: int = field(
        default=400,
        metadata={
            "help": "With `bema`, optimizer steps from one time that the reference becomes the average to the next.",
            "averages": _BEMA,
        },
    )
    ref_model_update_after: int = field(
        default=0,
        metadata={
            "help": "With `bema`, the optimizer step from which `ref_model_update_freq` counts.",
            "averages": _BEMA,
        },
    )
    scoring: Literal["exact", "packed"] = field(
        default="exact",
        metadata={"help": "`exact`: the trainer's own shapes, bit for bit. `packed`: shared prompts computed once."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")
        for name in ("sync_steps", "update_freq", "ref_model_update_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        not_negative = ("start_step", "update_after", "ref_model_update_after", "ema_power", "bias_power", "lag")
        for name in (*not_negative, "multiplier"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and less than 1, got {self.tolerance}")
        if not 0 <= self.min_ema_multiplier <= 1:
            raise ValueError(f"min_ema_multiplier must be from 0 to 1, got {self.min_ema_multiplier}")
        first_update = self.update_after + self.update_freq
        first_age = self.lag + self.multiplier * first_update
        if first_age < 1:
            raise ValueError(
                f"lag + multiplier * step must be at least 1 from the first update of the average on, which is after "
                f"step {first_update}, and it is {first_age} there: the policy would weigh more than 1. Raise lag "
                f"({self.lag}) or multiplier ({self.multiplier})"
            )
        self._check_average()

    def _check_average(self) -> None:
        """Refuse an option that has been set and that the chosen average does not use."""
        for option in fields(self):
            averages = option.metadata.get("averages", (self.average,))
            value = getattr(self, option.name)
            if self.average not in averages and value != option.default:
                flag = option.metadata.get("trl_flag")
                also = f" (TRL's flag `{flag}`)" if flag else ""
                raise ValueError(
                    f"{option.name}={value!r}{also} is for average={' or '.join(map(repr, averages))}, and "
                    f"average={self.average!r} does not use it. Remove it, or choose another average"
                )


EMA_CAPABILITIES = Capabilities(local_model=True, moving=True, temperature=True, multimodal=True, accepts_model=True)


@dataclass(frozen=True)
class RemoteOptions:
    """Options of `remote`."""

    url: str | list[str] = field(metadata={"help": "Address of the server, or of several that serve the same model."})
    protocol: Literal["refplug", "vllm"] = field(
        default="refplug",
        metadata={"help": "`refplug`: `trl-refplug serve`. `vllm`: any OpenAI-compatible one with `prompt_logprobs`."},
    )
    model: str | None = field(
        default=None, metadata={"help": "`vllm`: the name it is served under. By default the only one there is."}
    )
    api_key_env: str | None = field(
        default=None, metadata={"help": "Environment variable with the key that the server expects."}
    )
    starts_as_policy: bool = field(
        default=True,
        metadata={"help": "The server serves the policy as it starts, which is checked. `false`: another model."},
    )
    connect_timeout: float = field(default=5.0, metadata={"help": "Seconds to connect."})
    read_timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for an answer."})
    deadline: float = field(
        default=300.0, metadata={"help": "Seconds after which a batch that no server has answered ends the run."}
    )


REMOTE_CAPABILITIES = Capabilities(overlap=True, temperature=True, offline=True)
