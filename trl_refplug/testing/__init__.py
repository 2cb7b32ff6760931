"""
What authors of providers test with. Needs pytest, which only this package imports.

```python
import pytest
from trl_refplug.testing import ReferenceProviderTests

from uniform_reference import UniformProvider


class TestUniform(ReferenceProviderTests):
    @pytest.fixture
    def reference(self):
        return UniformProvider

    def expected_log_probs(self, policy, batch, temperature):
        return torch.full(batch.labels[:, 1:].shape, -math.log(policy.config.vocab_size))
```
"""

from trl_refplug.testing.bench import Attached, Bench
from trl_refplug.testing.kit import ReferenceProviderTests
from trl_refplug.testing.samples import (
    plain_log_probs,
    preference_data,
    tiny_image_policy,
    tiny_policy,
    tiny_tokenizer,
)


__all__ = [
    "Attached",
    "Bench",
    "ReferenceProviderTests",
    "plain_log_probs",
    "preference_data",
    "tiny_image_policy",
    "tiny_policy",
    "tiny_tokenizer",
]
