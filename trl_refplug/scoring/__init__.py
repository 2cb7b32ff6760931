"""
From a model and rows of tokens to per-token log-probabilities.

- `scorer`: [`Scorer`], which everyone else uses. It scores exactly or packed, and falls back from packed to exact
- `exact`: the exact way, which is TRL's own call on the batch as it is
- `packed`: the packed way, in which rows share prefixes and have no padding
- `layout`: plans which prefixes are shared and which rows go into one forward pass; knows no model
- `execution`: runs a planned forward pass through a model
- `attention`: attention along the tree of shared prefixes
- `head`: the LM head, without ever holding the logits of the whole vocabulary
- `operations`: counts the floating-point operations of a forward pass
- `packable`: tells from a configuration when packed answers would not be the exact ones
- `verification`: compares packed answers with exact ones before they are trusted
- `stats`: what a scorer counts
"""

from trl_refplug.rows import Row
from trl_refplug.scoring.exact import exact_log_probs
from trl_refplug.scoring.operations import count_operations
from trl_refplug.scoring.scorer import ExactFallbackWarning, Scorer, default_token_budget
from trl_refplug.scoring.stats import ScoreStats


__all__ = [
    "ExactFallbackWarning",
    "Row",
    "ScoreStats",
    "Scorer",
    "count_operations",
    "default_token_budget",
    "exact_log_probs",
]
