"""The conformance tests as a package: what they need from authors, and what they skip."""

import subprocess
import sys

import pytest

import trl_refplug.testing
from trl_refplug.testing import Bench, tiny_policy, tiny_tokenizer
from trl_refplug.testing.fixtures import Setting

from .planted_faults import NoFault


@pytest.mark.parametrize("name", trl_refplug.testing.__all__)
def test_public_names_are_documented(name):
    assert (getattr(trl_refplug.testing, name).__doc__ or "").strip()


def test_every_fixture_is_documented():
    kinds = vars(Setting).values()
    fixtures = [value for value in kinds if "fixture" in type(value).__name__.lower()]
    assert len(fixtures) == 8
    assert all(fixture.__doc__ for fixture in fixtures)


def test_nothing_else_imports_pytest():
    code = """
import sys
import trl_refplug.trainers, trl_refplug.cli.main
from trl_refplug.plugins import plugin_manager
for provider in plugin_manager().providers.values():
    provider.load()
print("pytest" in sys.modules)
import trl_refplug.testing
print("pytest" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "reference", ["frozen", ("frozen", {"scoring": "packed"}), NoFault, (NoFault, {"sharpness": 0.5})], ids=str
)
def test_reference_is_a_name_or_a_class_with_or_without_options(reference, tmp_path):
    bench = Bench(reference, tiny_policy(), tiny_tokenizer(), None, tmp_path, 1e-3)
    provider = bench.attach().provider
    options = reference[1] if isinstance(reference, tuple) else {}
    assert all(getattr(provider.options, name) == value for name, value in options.items())


def test_provider_that_cannot_be_loaded_is_one_line(tmp_path):
    """Every test fails with a message that says so."""
    bench = Bench("nowhere", tiny_policy(), tiny_tokenizer(), None, tmp_path, 1e-3)
    with pytest.raises(pytest.fail.Exception, match="No provider 'nowhere'") as caught:
        bench.attach()
    assert not caught.value.pytrace
    assert caught.value.__context__ is None


AUTHORS = """
import pytest
from trl_refplug import ReferenceIdentity, ReferenceProvider
from trl_refplug.testing import ReferenceProviderTests

class TestSilent(ReferenceProviderTests):
    pass

class TestLocal(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        class Local(ReferenceProvider):
            def identity(self):
                return ReferenceIdentity("local", "0")

            def log_probs(self, batch):
                return (batch.labels[:, 1:] != -100).float() * -1.0

        return Local
"""


def test_authors_are_told_what_is_missing(tmp_path):
    (tmp_path / "test_author.py").write_text(AUTHORS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    chosen = ["-k", "TestSilent and test_values or TestLocal and (test_values or test_two_ranks)"]
    command += [*chosen, "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Give it a fixture `reference`" in done.stdout
    assert "cannot be sent to another process" in done.stdout
    # A test fails with a sentence, and without a traceback through the kit.
    assert "override expected_log_probs() to say what it is." in done.stdout
    assert "answers.py" not in done.stdout


CALLS_THE_POLICY = """
import pytest
from trl_refplug.testing import ReferenceProviderTests

class TestCallsThePolicy(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return "frozen"

    def expected_log_probs(self, policy, batch, temperature):
        logits = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / temperature
        return logits.log_softmax(-1)[:, :-1].gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
"""


def test_the_truth_may_be_asked_of_the_policy_as_it_is(tmp_path):
    """Dropout is off for it, although trainers get the policy in train mode."""
    assert tiny_policy().training
    (tmp_path / "test_author.py").write_text(CALLS_THE_POLICY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", "test_values"]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
