"""
From a model to per-token log-probabilities: [`Scorer`], and the planning behind it.
"""

from trl_refplug.scoring.exact import exact_log_probs
from trl_refplug.scoring.execution import evaluation_mode, stay_in_evaluation_mode
from trl_refplug.scoring.rows import Row
from trl_refplug.scoring.scorer import ExactFallbackWarning, Scorer
from trl_refplug.scoring.stats import ScoreStats
from trl_refplug.scoring.threads import Autocast, ScoringThread


__all__ = [
    "Autocast",
    "ExactFallbackWarning",
    "Row",
    "ScoreStats",
    "Scorer",
    "ScoringThread",
    "evaluation_mode",
    "exact_log_probs",
    "stay_in_evaluation_mode",
]
