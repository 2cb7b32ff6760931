"""
What is known of a model, without scoring anything with it.

- `identity`: the digest of the distribution that a model computes
- `files`: digests that are remembered by a model's files
- `causal_lm`, `adapters`: finding the language model, or the PEFT model, inside whatever wraps it
- `modes`, `dropout`: evaluation mode, and dropout that TRL does not switch off
- `positions`: when a row's log-probs depend on where in a batch it stands
- `purity`: PEFT set-ups that would make a reference drift
- `sharding`: tensors of which every rank holds a part
- `tolerances`: how far two right answers may be apart
"""

from trl_refplug.models.identity import digest_model


__all__ = ["digest_model"]
