"""A reference that gives every token of the vocabulary the same probability."""

import math
from dataclasses import dataclass, field

from trl_refplug import Capabilities, ReferenceIdentity, ReferenceProvider


@dataclass(frozen=True)
class UniformOptions:
    scale: float = field(default=1.0, metadata={"help": "Multiplies every log-probability."})


class UniformProvider(ReferenceProvider):
    Options = UniformOptions
    capabilities = Capabilities(temperature=True, offline=True)

    def pin(self, context):
        self.vocab_size = context.policy.config.get_text_config().vocab_size

    def identity(self):
        return ReferenceIdentity("uniform", digest=f"uniform-{self.vocab_size}-{self.options.scale}")

    def log_probs(self, batch):
        return (batch.labels[:, 1:] != -100).float() * -math.log(self.vocab_size) * self.options.scale
