"""The fixtures with which an author describes the provider under test, and those that all tests start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from trl_refplug.models.tolerances import TOLERANCES
from trl_refplug.provider import ReferenceBatch
from trl_refplug.testing.bench import Attached, Bench, Reference
from trl_refplug.testing.samples import plain_log_probs, tiny_image_policy, tiny_policy, tiny_tokenizer


if TYPE_CHECKING:
    from torch import Tensor, nn


class Setting:
    """The fixtures and hooks that an author may override; see [`ReferenceProviderTests`]."""

    tolerance: float = TOLERANCES[torch.float32].largest
    """Answers that differ by no more than this, in nats per token, count as the same: it is what float32 rounds."""

    @pytest.fixture
    def reference(self) -> Reference:
        """The provider under test: its class or registered name, or a pair of that and its options."""
        pytest.fail(
            f"{type(self).__name__} does not say which provider it tests. Give it a fixture `reference` that returns "
            "the provider's class or registered name, or a pair of that and its options.",
            pytrace=False,
        )

    @pytest.fixture
    def other_options(self) -> Sequence[Mapping[str, Any]]:
        """Other options, to compare identities with: some that change the log-probs, and some that do not."""
        return ()

    @pytest.fixture
    def policy(self) -> nn.Module:
        """The policy: a random Llama of a few thousand parameters."""
        policy: nn.Module = tiny_policy()
        return policy

    @pytest.fixture
    def image_policy(self) -> nn.Module:
        """The policy of the test with images, for a provider that declares `multimodal`: a random Llava."""
        policy: nn.Module = tiny_image_policy()
        return policy

    @pytest.fixture
    def processing_class(self) -> Any:
        """The tokenizer of the policy."""
        return tiny_tokenizer()

    @pytest.fixture
    def peft_config(self) -> Any:
        """The trainer's `peft_config` argument, for a provider that needs a PEFT policy."""
        return None

    def expected_log_probs(self, policy: nn.Module, batch: ReferenceBatch, temperature: float) -> Tensor:
        """
        What the reference should answer, computed without the provider.

        Args:
            policy (`nn.Module`): A copy of the policy as it is passed to the trainer, in evaluation mode.
            batch ([`ReferenceBatch`]): Rows to score.
            temperature (`float`): The logits are divided by it.

        Returns:
            `Tensor`: `[batch, seq - 1]`, of any float dtype. Only scored positions are compared. By default the
            policy's own log-probs, in float64.
        """
        return plain_log_probs(policy, batch, temperature)

    # For the tests

    @pytest.fixture
    def bench(
        self, reference: Reference, policy: Any, processing_class: Any, peft_config: Any, tmp_path: Path
    ) -> Bench:
        """Makes trainers that use the provider."""
        return Bench(reference, policy, processing_class, peft_config, tmp_path, self.tolerance)

    @pytest.fixture
    def attached(self, bench: Bench) -> Attached:
        """The provider, attached to a DPO trainer."""
        return bench.attach()
