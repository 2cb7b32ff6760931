"""The mixture keeps every promise that training relies on, and is the one that its formula says."""

import math
from dataclasses import replace

import pytest
import torch
from trl_refplug import OptionsError
from trl_refplug.options import parse_options
from trl_refplug.providers.frozen import FrozenProvider
from trl_refplug.testing import ReferenceProviderTests, plain_log_probs, tiny_policy

from refplug_mixture.provider import MixtureOptions, MixtureProvider


def mixture(*parts):
    return {"parts": [{"provider": name, "weight": weight, "kwargs": kwargs} for name, weight, kwargs in parts]}


class TestMixture(ReferenceProviderTests):
    """The policy as it starts, and another model."""

    @pytest.fixture
    def other(self, tmp_path):
        tiny_policy(seed=1).save_pretrained(tmp_path / "other")
        return {"model": str(tmp_path / "other")}

    @pytest.fixture
    def reference(self, other):
        return "mixture", mixture(("frozen", 0.7, None), ("frozen", 0.3, other))

    @pytest.fixture
    def other_options(self, other):
        swapped = mixture(("frozen", 0.3, other), ("frozen", 0.7, None))
        return [swapped, mixture(("frozen", 0.5, None), ("frozen", 0.5, other))]

    @pytest.fixture
    def image_policy(self):
        pytest.skip("the other model reads text only")

    def expected_log_probs(self, policy, batch, temperature):
        own = plain_log_probs(policy, batch, temperature)
        other = plain_log_probs(tiny_policy(seed=1), batch, temperature)
        return torch.logaddexp(own + math.log(0.7), other + math.log(0.3))


class TestMovingMixture(ReferenceProviderTests):
    """The policy as it starts, and its moving average, which start as one."""

    @pytest.fixture
    def reference(self):
        return "mixture", mixture(("frozen", 0.5, None), ("ema", 0.5, {"sync_steps": 1}))


def test_it_can_do_what_its_parts_can():
    def capabilities(*names):
        parts = mixture(*((name, 1 / len(names), None) for name in names))
        return MixtureProvider(parse_options("mixture", MixtureOptions, parts)).capabilities

    # A mixture has a model of its own in each part, and no use for one that is passed to the trainer.
    assert capabilities("frozen", "adapter") == replace(FrozenProvider.capabilities, accepts_model=False)
    assert capabilities("frozen", "cached").multimodal is False
    moving = capabilities("frozen", "ema")
    assert moving.moving
    assert not moving.offline
    assert moving.temperature


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("frozen", 1.0, None)], "two parts or more, got 1"),
        ([("frozen", 0.5, None), ("frozen", 0.4, None)], "sum to 1, got 0.9"),
        ([("frozen", 1.5, None), ("frozen", -0.5, None)], "got -0.5"),
        ([("frozen", "much", None), ("frozen", 0.5, None)], "weight"),
    ],
)
def test_what_is_no_mixture_is_refused(parts, message):
    with pytest.raises(OptionsError, match=message):
        parse_options("mixture", MixtureOptions, mixture(*parts))
