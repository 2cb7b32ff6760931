"""
From a model to per-token log-probabilities: [`Scorer`], and the planning behind it.
"""

from trl_refplug.scoring.exact import ensure_fused_head, exact_log_probs
from trl_refplug.scoring.scorer import ExactFallbackWarning, Scorer
from trl_refplug.scoring.stats import ScoreStats


__all__ = ["ExactFallbackWarning", "ScoreStats", "Scorer", "ensure_fused_head", "exact_log_probs"]
