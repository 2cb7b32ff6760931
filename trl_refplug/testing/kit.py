"""The conformance tests of a reference provider, which its author subclasses."""

from __future__ import annotations

from trl_refplug.testing.abilities import AbilityTests
from trl_refplug.testing.answers import AnswerTests
from trl_refplug.testing.effects import SideEffectTests
from trl_refplug.testing.identities import IdentityTests
from trl_refplug.testing.lifecycle import LifeTests
from trl_refplug.testing.runs import OverlapTests, RankTests, TrainingTests


class ReferenceProviderTests(
    AnswerTests, AbilityTests, SideEffectTests, IdentityTests, TrainingTests, OverlapTests, RankTests, LifeTests
):
    """
    Tests of what a provider has to promise, one test for each way to break a promise.

    Subclass it in a module that pytest collects, and say what is tested with the fixture `reference`: the provider's
    class or registered name, or a pair of that and its options. The provider works in real, tiny trainers on the CPU;
    nothing is downloaded. Tests of capabilities that it does not declare are skipped. The test `test_two_ranks` starts
    two processes and takes as long as importing TRL; leave it out with `-k "not two_ranks"`.

    The answers are compared with the policy's own log-probs, computed by transformers alone. If the reference of your
    provider is another model, override [`expected_log_probs`]. You may also override the fixtures `other_options`,
    `policy`, `image_policy`, `processing_class` and `peft_config`, and, for a reference in low precision, the class
    attribute `tolerance`.

    Example:

    ```python
    class TestFrozen(ReferenceProviderTests):
        @pytest.fixture
        def reference(self):
            return "frozen", {"scoring": "packed"}
    ```
    """
