"""The provider `mixture`: several references, mixed in probability space."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from trl_refplug import Capabilities, ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One reference of the mixture."""

    provider: str
    weight: float
    kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be greater than 0 and at most 1, got {self.weight}")


@dataclass(frozen=True)
class MixtureOptions:
    """Options of `mixture`."""

    parts: list[Part] = field(
        metadata={"help": "References by name: [{'provider': ..., 'weight': ..., 'kwargs': {...}}, ...]."}
    )

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"a mixture has two parts or more, got {len(self.parts)}")
        total = sum(part.weight for part in self.parts)
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the weights of the parts must sum to 1, got {total:g}")


class MixtureProvider(ReferenceProvider):
    """
    Scores with `log sum_i w_i p_i` per token: the next token comes from reference `i` with probability `w_i`.

    A policy may then keep close to any of several references, such as the model before and after supervised
    fine-tuning, without being held to their average logits.
    """

    Options = MixtureOptions
    # What a mixture can do at best. An instance can do what its parts can.
    capabilities = Capabilities(local_model=True, overlap=True, temperature=True, multimodal=True, offline=True)
    options: MixtureOptions

    def __init__(self, options: MixtureOptions | None = None) -> None:
        super().__init__(options)
        self._parts: list[ReferenceProvider] = []
        self._weights = [part.weight for part in self.options.parts]
        self._waiting = ThreadPoolExecutor(max_workers=1)  # starts a thread when it is first used
        self.capabilities = _combined([_capabilities_of(part.provider) for part in self.options.parts])

    @property
    def starts_as_policy(self) -> bool:
        return all(part.starts_as_policy for part in self._parts)

    def pin(self, context: ReferenceContext) -> None:
        # Parts are pinned, placed, set up and closed with us.
        self._parts = [context.create(part.provider, part.kwargs) for part in self.options.parts]

    def setup(self, context: ReferenceContext) -> None:
        self.capabilities = _combined([part.capabilities for part in self._parts])  # by now, theirs are final

    def identity(self) -> ReferenceIdentity:
        mixed = sorted(
            ((part.identity(), weight) for part, weight in zip(self._parts, self._weights, strict=True)),
            key=lambda pair: (pair[0].digest, pair[1]),
        )  # the order of the parts changes no value
        terms = "+".join(f"{weight!r}*{identity.digest}" for identity, weight in mixed)
        return ReferenceIdentity(
            "mixture",
            digest=xxhash.xxh3_128(terms.encode()).hexdigest(),
            details={"weights": [weight for _, weight in mixed]},
            parts=tuple(identity for identity, _ in mixed),
        )

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        return self._mixed([part.log_probs(batch) for part in self._parts], batch)

    def submit(self, batch: ReferenceBatch) -> Future[Tensor]:
        pending = [part.submit(batch) for part in self._parts]
        return self._waiting.submit(lambda: self._mixed([part.result() for part in pending], batch))

    def _mixed(self, answers: list[Tensor], batch: ReferenceBatch) -> Tensor:
        import torch

        weighted = torch.stack(
            [answer + math.log(weight) for answer, weight in zip(answers, self._weights, strict=True)]
        )
        return torch.where(batch.labels[:, 1:] != -100, weighted.logsumexp(dim=0), 0.0)

    def close(self) -> None:
        self._waiting.shutdown(wait=False)

    # A mixture moves where a part does

    def on_step_end(self, step: int) -> None:
        for part in self._parts:
            if part.capabilities.moving:
                part.on_step_end(step)

    def counters(self) -> dict[str, float]:
        return {
            f"part{index}/{name}": value
            for index, part in enumerate(self._parts)
            for name, value in part.counters().items()
        }

    def metadata(self) -> dict[str, Any]:
        return {"parts": [part.metadata() for part in self._parts]}

    def save_state(self, directory: Path) -> None:
        for index, part in enumerate(self._parts):
            own = directory / f"part{index}"
            own.mkdir(exist_ok=True)
            part.save_state(own)

    def load_state(self, directory: Path) -> None:
        for index, part in enumerate(self._parts):
            part.load_state(directory / f"part{index}")


def _capabilities_of(name: str) -> Capabilities:
    from trl_refplug.plugins import plugin_manager

    return plugin_manager().provider_class(name).capabilities


def _combined(parts: list[Capabilities]) -> Capabilities:
    """What a mixture of providers with these capabilities can do."""
    return Capabilities(
        local_model=any(part.local_model for part in parts),
        moving=any(part.moving for part in parts),
        overlap=all(part.overlap and not part.moving for part in parts),
        temperature=all(part.temperature for part in parts),
        multimodal=all(part.multimodal for part in parts),
        offline=all(part.offline for part in parts),
    )
