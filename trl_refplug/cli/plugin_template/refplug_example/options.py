"""The options of `example`, and what it can do. This module imports no torch, so that listing plugins stays instant."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_refplug import Capabilities


@dataclass(frozen=True)
class ExampleOptions:
    """Options of `example`: what `ref_provider_kwargs` may hold."""

    sharpness: float = field(
        default=1.0, metadata={"help": "Multiplies the reference's logits; 1 is the policy itself."}
    )

    def __post_init__(self) -> None:
        if self.sharpness <= 0:
            raise ValueError(f"sharpness must be positive, got {self.sharpness}")


CAPABILITIES = Capabilities(local_model=True, temperature=True, multimodal=True, offline=True)
