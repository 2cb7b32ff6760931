"""Tests that the provider keeps every promise that training relies on."""

import pytest
from trl_refplug.testing import ReferenceProviderTests


class TestExample(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "example", {"sharpness": 2.0}  # the registered name and the options to test with

    @pytest.fixture
    def other_options(self):
        return [{"sharpness": 0.5}]

    def expected_log_probs(self, policy, batch, temperature):
        # This says what the reference is without using the provider: the policy at half the temperature.
        return super().expected_log_probs(policy, batch, temperature / 2.0)
