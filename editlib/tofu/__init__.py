"""TOFU (2401.06121): its sets of questions with their subjects, and scores of models on them."""

from editlib.tofu.scores import TofuScores, compare_tofu, tofu_scores
from editlib.tofu.sets import Asked, TofuSets, read_tofu

__all__ = ["Asked", "TofuScores", "TofuSets", "compare_tofu", "read_tofu", "tofu_scores"]
