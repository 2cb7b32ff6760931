"""
What is known of a model, without scoring anything with it.

- `identity`: digests of the distribution that a model computes, and canonical names of its tensors
- `files`: a cache of digests and other facts, found by a fingerprint of a model's files
- `pretrained`: load a model, or an adapter with its base model, by name
- `copies`: a second, frozen model from the policy in memory
- `causal_lm`: the causal language model inside its wrappers
- `adapters`: a PEFT policy as its own reference
- `adapter_purity`: PEFT configurations with which a reference would drift
- `weights`: notice that weights were changed
- `sharding`: tensors of which every rank holds a part
- `modes`, `dropout`: evaluation mode, and the dropout that TRL does not switch off
- `output_embedding`: what a fused LM head takes for granted of the output embedding, and the vocabulary
- `positions`: whether a row's log-probs depend on its place in the batch or on the batch's length
- `traits`: what decides, besides the identity, which stored values may be used
- `tolerances`: how far two correct answers may be apart
- `probe`: a few rows of text that a reference is asked about again and again

The digest is the only public name. Other rooms import from these modules, which are not all cheap to import.
"""

from trl_refplug.models.identity import digest_model


__all__ = ["digest_model"]
