"""Scorers: what a model would lose by each scheme of each layer."""

from ar_tuner.auto_scheme.scorers.base import Scorer, Scores, ScoreTask, Values

__all__ = ["ScoreTask", "Scorer", "Scores", "Values"]
