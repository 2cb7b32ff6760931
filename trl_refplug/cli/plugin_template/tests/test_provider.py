"""The provider keeps every promise that training relies on."""

import pytest
from trl_refplug.testing import ReferenceProviderTests


class TestExample(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "example", {"sharpness": 2.0}  # the registered name, and options

    @pytest.fixture
    def other_options(self):
        return [{"sharpness": 0.5}]

    def expected_log_probs(self, policy, batch, temperature):
        # What the reference is, without the provider: the policy at half the temperature.
        return super().expected_log_probs(policy, batch, temperature / 2.0)
