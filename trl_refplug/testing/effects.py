"""Tests that asking for the reference changes nothing in the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl_refplug.runtime.random_state import random_state
from trl_refplug.testing.bench import Attached, Bench, require
from trl_refplug.testing.fixtures import Setting


class SideEffectTests(Setting):
    def test_no_gradient(self, attached: Attached) -> None:
        attached.ask(attached.batch)
        with torch.enable_grad():
            answers = [attached.provider.log_probs(attached.batch.copy())]
            if attached.provider.capabilities.overlap:
                answers.append(attached.provider.submit(attached.batch.copy()).result(timeout=60))
        require(
            not any(answer.requires_grad for answer in answers),
            "The answer carries a gradient, so the loss would train through the reference and keep its activations. "
            "Compute it under torch.no_grad().",
        )

    def test_random_streams(self, attached: Attached) -> None:
        before = random_state()
        _act_as_training_step(attached)
        moved = [name for name, state in random_state().items() if state != before[name]]
        if moved:
            attached.needs_determinism()  # that test's message says what draws the numbers
        require(
            not moved,
            f"The global random stream of {', '.join(moved)} moved, so the data order and dropout of training change "
            "with the reference. Score in evaluation mode, and draw from a generator of your own.",
        )

    def test_modes(self, attached: Attached) -> None:
        def modes() -> dict[str, bool]:
            return {name: module.training for name, module in attached.policy.named_modules()}

        before = modes()
        _act_as_training_step(attached)
        changed = _changed(before, modes())
        require(
            not changed,
            f"{len(changed)} modules of the policy were left in another mode, train or eval ({_listed(changed)}). Put "
            "every module back in the mode it had: a frozen part may have been in eval mode before.",
        )

    def test_requires_grad(self, bench: Bench) -> None:
        def flags() -> dict[str, bool]:
            return {name: parameter.requires_grad for name, parameter in attached.policy.named_parameters()}

        trainable = {name for name, parameter in bench.policy.named_parameters() if parameter.requires_grad}
        attached = bench.attach()
        built = flags()
        frozen = [] if bench.peft_config else [name for name in trainable if not built.get(name, True)]
        _act_as_training_step(attached)
        changed = [*frozen, *_changed(built, flags())]
        require(
            not changed,
            f"requires_grad of {len(changed)} of the policy's parameters changed ({_listed(changed)}), so another "
            "part of it is trained. Restore every flag; freeze copies, not the policy.",
        )

    def test_weights(self, attached: Attached) -> None:
        def weights() -> dict[str, bytes]:
            return {
                name: tensor.detach().cpu().float().numpy().tobytes()
                for name, tensor in attached.policy.state_dict().items()
                if "." + _reference_adapter(attached) + "." not in name
            }

        before = weights()
        _act_as_training_step(attached)
        changed = _changed(before, weights())
        require(not changed, f"{len(changed)} of the policy's weights were changed ({_listed(changed)}).")

    def test_active_adapter(self, attached: Attached) -> None:
        from trl_refplug.models.adapters import is_peft

        if not is_peft(attached.policy):
            pytest.skip("the policy has no adapter; give a `peft_config` if yours may")

        def state() -> dict[str, Any]:
            layers = {
                name: (module.active_adapters, module.disable_adapters)
                for name, module in attached.policy.named_modules()
                if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters")
            }
            return {"active": attached.policy.active_adapter, **layers}

        before = state()
        _act_as_training_step(attached)
        changed = _changed(before, state())
        require(
            not changed,
            f"The policy's active adapter was left changed or disabled ({_listed(changed)}). Switch it back.",
        )

    def test_batch(self, attached: Attached) -> None:
        batch = attached.batch.copy()
        with torch.no_grad():
            attached.provider.log_probs(batch)
        changed = [
            name
            for name in ("input_ids", "attention_mask", "labels")
            if not torch.equal(getattr(batch, name), getattr(attached.batch, name))
        ]
        require(
            not changed,
            f"The batch's {' and '.join(changed)} changed in place. The trainer goes on to use these very tensors: "
            "work on a copy (masked_fill, not masked_fill_).",
        )


def _act_as_training_step(attached: Attached) -> None:
    """Call everything that a training step may call."""
    provider = attached.provider
    with torch.no_grad():
        provider.log_probs(attached.batch.copy())
        if provider.capabilities.overlap:
            provider.submit(attached.batch.copy()).result(timeout=60)
        if provider.capabilities.moving:
            provider.on_step_end(1)
        provider.counters()


def _reference_adapter(attached: Attached) -> str:
    """The name of the policy's adapter that is the reference. Its weights may change if the reference moves."""
    return str(attached.provider.reference_adapter)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
