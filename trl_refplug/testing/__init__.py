"""
The conformance tests for authors of providers. They need pytest, which only this package imports.

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

The modules:

- `kit`: the class that authors subclass, put together from the test classes below
- `fixtures`: the fixtures that authors may override
- `answers`: tests that the answers are the log-probs of the declared reference
- `abilities`: tests of the optional abilities that a provider declares
- `effects`: tests that asking for the reference changes nothing in the training
- `identities`: tests that the identity says which reference it is
- `runs`: tests of whole training runs, with checkpoints, prefetching and two processes
- `lifecycle`: tests of the options, of the declared capabilities and of `close`
- `bench`: attaches a provider to a small, real trainer, and compares its answers
- `ranks`: starts two processes and runs a function on both
- `samples`: makes tiny models, tokenizers, data sets and batches
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
