"""The built-in providers keep every promise of the conformance kit."""

import signal

import pytest
from peft import LoraConfig, get_peft_model

from trl_refplug.serving import Engine
from trl_refplug.testing import ReferenceProviderTests, tiny_image_policy, tiny_policy, tiny_tokenizer

from ..serving.servers import serving


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def with_trained_adapter(model):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


class Variant:
    """For providers that are tested on two ranks elsewhere: these tests take twenty seconds each."""

    @pytest.mark.slow
    def test_two_ranks(self, bench):
        super().test_two_ranks(bench)


class TestFrozen(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "frozen"

    @pytest.fixture
    def other_options(self):
        return [{"scoring": "packed"}, {"dtype": "bfloat16"}]

    def test_two_ranks(self, bench):
        before = {number: signal.getsignal(number) for number in signal.valid_signals()}
        super().test_two_ranks(bench)
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before


class TestFrozenPacked(Variant, ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "frozen", {"scoring": "packed"}


class TestAdapter(ReferenceProviderTests):
    """The policy gets a new adapter, and the reference is the policy with that adapter disabled."""

    @pytest.fixture
    def reference(self):
        return "adapter"

    @pytest.fixture
    def peft_config(self):
        return LORA


class TestTrainedAdapter(Variant, ReferenceProviderTests):
    """The policy comes with an adapter, and the reference is a frozen copy of it."""

    @pytest.fixture
    def reference(self):
        return "adapter"

    @pytest.fixture
    def policy(self):
        return with_trained_adapter(tiny_policy())

    @pytest.fixture
    def image_policy(self):
        return with_trained_adapter(tiny_image_policy())

    @pytest.fixture
    def other_options(self):
        return [{"start": "base"}, {"scoring": "packed"}]


class TestCached(ReferenceProviderTests):
    """The policy itself scores the rows, before it is trained."""

    @pytest.fixture
    def reference(self, tmp_path):
        return "cached", {"path": str(tmp_path / "store")}


class TestCachedAdapter(Variant, ReferenceProviderTests):
    @pytest.fixture
    def reference(self, tmp_path):
        return "cached", {"path": str(tmp_path / "store"), "fill": "lazy"}

    @pytest.fixture
    def peft_config(self):
        return LORA


class TestRemote(ReferenceProviderTests):
    """A server in this process, on a real socket. It has the model that the policy starts as."""

    @pytest.fixture
    def reference(self):
        with serving(Engine(tiny_policy().eval(), "tiny", tokenizer=tiny_tokenizer())) as url:
            yield "remote", {"url": url}

    def expected_log_probs(self, policy, batch, temperature):
        return super().expected_log_probs(tiny_policy(), batch, temperature)


class TestEma(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "ema", {"sync_steps": 1, "alpha": 0.5}


class TestEmaAdapter(Variant, ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "ema", {"sync_steps": 1, "alpha": 0.5}

    @pytest.fixture
    def peft_config(self):
        return LORA
