"""
From a model to per-token log-probabilities: [`Scorer`], and the planning behind it.
"""

from trl_refplug.scoring.exact import exact_log_probs
from trl_refplug.scoring.scorer import ExactFallbackWarning, Scorer
from trl_refplug.scoring.stats import ScoreStats


__all__ = ["ExactFallbackWarning", "ScoreStats", "Scorer", "exact_log_probs"]
