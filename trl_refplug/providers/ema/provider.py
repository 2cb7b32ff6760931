"""The `ema` provider: a reference that follows the policy, by a moving average of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from trl_refplug.errors import ConfigurationError, ReferenceMismatchError
from trl_refplug.models.adapter_purity import check_policy
from trl_refplug.models.adapters import (
    REFERENCE_ADAPTER,
    base_model_of,
    is_peft,
    peft_model_of,
    policy_adapter,
    reference_active,
    save_without,
    starts_as_identity,
)
from trl_refplug.models.copies import snapshot
from trl_refplug.models.identity import canonical_tensors, combine_digests, digest_model, digest_tensors
from trl_refplug.models.modes import stay_in_evaluation_mode
from trl_refplug.provider import ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider
from trl_refplug.providers.ema.adapter_average import AdapterAverage
from trl_refplug.providers.ema.bias_corrected import BiasCorrectedAverage
from trl_refplug.providers.ema.model_average import ModelAverage
from trl_refplug.providers.ema.protocols import MovingAverage, MovingReference
from trl_refplug.providers.ema.tensor_files import clear_tensors
from trl_refplug.providers.options import EMA_CAPABILITIES, EmaOptions
from trl_refplug.providers.trainer_scoring import trainer_scorer
from trl_refplug.scoring import Scorer


_STATE = "ema.json"


class EmaProvider(ReferenceProvider):
    """
    Scores with a moving average of the policy (TR-DPO, arXiv 2404.09656; BEMA, arXiv 2508.00180). In full fine-tuning
    it is a second model in the trainer's process, and with a LoRA policy a second adapter of the policy.

    Args:
        options ([`EmaOptions`]): How the reference moves.
        model (`nn.Module`, *optional*): The model that the reference is at the start. By default this is the policy as
            it was passed in.
    """

    Options = EmaOptions
    capabilities = EMA_CAPABILITIES
    options: EmaOptions

    def __init__(self, options: EmaOptions | None = None, *, model: nn.Module | None = None) -> None:
        super().__init__(options)
        self._given = model
        self._start = ""
        self._architecture = ""
        self._context: ReferenceContext | None = None
        self._module: nn.Module | None = None
        self._kept_moving: MovingReference | None = None
        self._moves: Callable[[int], bool] | None = None
        self._scorers: dict[tuple[nn.Module, str], Scorer] = {}
        self._is_peft = False
        self._syncs = 0
        self._last: tuple[ReferenceBatch, Tensor] | None = None

    @property
    def starts_as_policy(self) -> bool:
        return self._given is None

    @property
    def module(self) -> nn.Module | None:
        return self._module

    @property
    def reference_adapter(self) -> str | None:
        """With PEFT, the name of the policy's adapter that is the reference."""
        return REFERENCE_ADAPTER if self._is_peft else None

    def pin(self, context: ReferenceContext) -> nn.Module | None:
        self._is_peft = context.peft_config is not None or is_peft(context.policy)
        if self._is_peft:
            if self.options.average == "bema":
                raise ConfigurationError(
                    "ref_provider='ema': average='bema' averages whole models, and the policy is a PEFT model, whose "
                    "reference is an adapter. Use average='exact', which averages what the adapter adds to the "
                    "weights, or train the whole model."
                )
            if self._given is not None:
                raise ConfigurationError(
                    "A reference model was passed (`ref_model=`), and with a PEFT policy the 'ema' reference is an "
                    "adapter of the policy that starts where the policy does. Remove `ref_model`."
                )
            if is_peft(context.policy):
                check_policy(context.policy, "ema")
            return None  # the policy's adapter may not exist yet
        module = snapshot(context.policy) if self._given is None else self._given
        self._start = digest_model(module)
        self._architecture = type(module).__name__
        return module

    def setup(self, context: ReferenceContext) -> None:
        _refuse_fsdp1(context.accelerator)
        self._context = context
        dtype = getattr(torch, self.options.master_dtype)
        device = torch.device("cpu") if self.options.master_device == "cpu" else None
        if self._is_peft:
            self._setup_adapter(context, dtype, device)
        else:
            self._setup_model(context, dtype, device)

    def _setup_model(self, context: ReferenceContext, dtype: torch.dtype, device: torch.device | None) -> None:
        self._module = context.reference_model
        assert self._module is not None, "the trainer places what pin() returned"
        stay_in_evaluation_mode(self._module)  # a model passed as `ref_model=` may still be in train mode
        if self.options.average == "bema":
            corrected = BiasCorrectedAverage(self._module, lambda: context.policy, self.options, dtype, device)
            corrected.check_same_architecture()
            self._kept_moving, self._moves = corrected, corrected.step_ended
        else:
            average = ModelAverage(self._module, lambda: context.policy, dtype, device)
            average.check_same_architecture()
            self._keep_average(average)

    def _setup_adapter(self, context: ReferenceContext, dtype: torch.dtype, device: torch.device | None) -> None:
        policy = peft_model_of(context.policy)
        check_policy(policy, "ema")
        adapter = policy_adapter(policy)
        if starts_as_identity(policy, adapter):
            self._start = combine_digests(base_model_of(policy), digest_tensors(policy))
        else:
            self._start = combine_digests(policy, digest_tensors(policy, adapter), adapter)
        self._keep_average(AdapterAverage(lambda: context.policy, self.options, dtype, device))
        assert self.reference_adapter is not None
        save_without(policy, self.reference_adapter)

    def _keep_average(self, average: MovingAverage) -> None:
        """Move the reference by mixing the policy into it, every `sync_steps` steps."""

        def sync(step: int) -> bool:
            # A sync falls on a multiple of `sync_steps`, as TRL counts. With alpha 0 it would only cost time.
            options = self.options
            if not options.alpha or step < options.start_step or step % options.sync_steps:
                return False
            average.move_to_policy(options.alpha)
            return True

        self._kept_moving, self._moves = average, sync

    @property
    def _moving(self) -> MovingReference:
        assert self._kept_moving is not None, "setup() comes first"
        return self._kept_moving

    def identity(self) -> ReferenceIdentity:
        assert self._start, "identity() before setup()"
        schedule = self._schedule()
        digest = xxhash.xxh3_128(json.dumps([self._start, schedule]).encode()).hexdigest()
        return ReferenceIdentity("ema", digest, {"start": self._start[:12], **schedule})

    def _schedule(self) -> dict[str, Any]:
        """Return the options that decide where the reference is after a number of steps."""
        options = asdict(self.options)
        if self.options.average == "bema":
            of_bema = [option.name for option in fields(self.options) if "bema" in option.metadata.get("averages", ())]
            names = ["average", *of_bema, "master_dtype"]
        else:
            names = ["alpha", "sync_steps", "start_step", "master_dtype"]
            if self._is_peft:
                names += ["average", "tolerance", "max_rank"] if self.options.average == "exact" else ["average"]
        return {name: options[name] for name in names}

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        if self._context is None or not self._is_peft:
            return []
        return canonical_tensors(peft_model_of(self._context.policy), None)  # the base model, which must not move

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        assert self._context is not None, "log_probs() before setup()"
        policy = self._context.policy
        if self._is_peft:
            with reference_active(policy, self.reference_adapter):
                log_probs = self._score(policy, self.options.scoring, batch)
        else:
            assert self._module is not None, "log_probs() after close()"
            log_probs = self._score(self._module, self.options.scoring, batch)
        if policy.training:
            self._last = batch, log_probs.clone()
        return log_probs

    def _score(self, model: nn.Module, mode: Literal["exact", "packed"], batch: ReferenceBatch) -> Tensor:
        assert self._context is not None
        if (model, mode) not in self._scorers:  # FSDP and DeepSpeed replace the policy as training starts
            self._scorers[model, mode] = trainer_scorer(model, self._context, mode)
        return self._scorers[model, mode].log_probs(batch)

    def on_step_end(self, step: int) -> None:
        assert self._moves is not None, "setup() comes first"
        self._syncs += self._moves(step)

    def counters(self) -> dict[str, float]:
        assert self._context is not None
        policy = self._context.policy
        counters = {
            "syncs": float(self._syncs),
            "distance": self._moving.distance_to_policy(),
            **self._moving.counters(),
        }
        if self._last is not None:
            counters["log_ratio"] = self._log_ratio(policy, *self._last)
            self._last = None
        return counters

    def _log_ratio(self, policy: nn.Module, batch: ReferenceBatch, reference: Tensor) -> float:
        """Return the mean of `log policy - log reference` over the scored tokens of a batch, in nats."""
        log_probs = self._score(policy, "exact", batch)
        scored = batch.labels[:, 1:] != -100
        return float((log_probs - reference)[scored].mean()) if scored.any() else 0.0

    def metadata(self) -> dict[str, Any]:
        return {"syncs": self._syncs}

    def save_state(self, directory: Path) -> None:
        assert self._context is not None
        accelerator, writes = self._context.accelerator, self._context.args.should_save
        if writes:
            clear_tensors(directory)
        if self._moving.sharded:
            accelerator.wait_for_everyone()
        self._moving.save(directory, rank=accelerator.process_index, writes=writes)
        if writes:
            state: dict[str, Any] = {"kind": "adapter", "syncs": self._syncs}
            if self._module is not None:
                state.update(kind="model", architecture=self._architecture)
                accelerator.unwrap_model(self._module).config.save_pretrained(directory)
            (directory / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        if self._moving.sharded:
            accelerator.wait_for_everyone()  # the checkpoint counts as complete soon after this returns

    def on_train_begin(self) -> None:
        self._moving.training_begins()

    def on_train_end(self) -> None:
        self._moving.training_ends()

    def load_state(self, directory: Path) -> None:
        state = read_state(directory)
        self._moving.load(directory)
        self._syncs = state["syncs"]

    def close(self) -> None:
        # The trainer's objects may outlive training, and must not keep the reference in memory.
        self._module = None
        self._given = None
        self._kept_moving = None
        self._moves = None
        self._context = None
        self._last = None
        self._scorers.clear()


def _refuse_fsdp1(accelerator: Any) -> None:
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ConfigurationError(
            "ref_provider='ema' pairs the policy's parameters with the reference's by name, and FSDP version 1 "
            "flattens them into others. Set `fsdp_version: 2` (in the accelerate configuration, or "
            "`fsdp_config={'version': 2}`)."
        )


def read_state(directory: Path) -> dict[str, Any]:
    """
    Return what a checkpoint says about its moving reference, without the tensors.

    Raises:
        ReferenceMismatchError: The checkpoint has no moving reference, or what it says cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        return state
    except (OSError, json.JSONDecodeError) as error:
        raise ReferenceMismatchError(
            f"{directory} has no state of a moving reference ({error}), so it cannot go on where it was. Resume from "
            "a checkpoint written with ref_provider='ema', or start anew."
        ) from error
