"""The conformance tests of a reference provider, to be subclassed by its author."""

from __future__ import annotations

from trl_refplug.testing.abilities import AbilityTests
from trl_refplug.testing.answers import AnswerTests
from trl_refplug.testing.effects import SideEffectTests
from trl_refplug.testing.identities import IdentityTests
from trl_refplug.testing.life import LifeTests
from trl_refplug.testing.runs import OverlapTests, RankTests, TrainingTests


class ReferenceProviderTests(
    AnswerTests, AbilityTests, SideEffectTests, IdentityTests, TrainingTests, OverlapTests, RankTests, LifeTests
):
    """
    Every promise that a provider can break, one test each.

    Subclass it in a module that pytest collects, and say what is tested with the fixture `reference`: the provider's
    class or registered name, or a pair of that and its options. The provider works in real, tiny trainers on the CPU;
    nothing is downloaded. What its capabilities do not declare is skipped. The last test starts two processes and
    takes as long as importing TRL; leave it out with `-k "not two_ranks"`.

    The truth is the policy's own log-probs, computed by transformers alone. A provider whose reference is another one
    overrides [`expected_log_probs`]. Further fixtures may be overridden: `other_options`, `policy`,
    `image_policy`, `processing_class`, `peft_config`; and the class attribute `tolerance`, for a reference in low
    precision.

    Example:

    ```python
    class TestFrozen(ReferenceProviderTests):
        @pytest.fixture
        def reference(self):
            return "frozen", {"scoring": "packed"}
    ```
    """
