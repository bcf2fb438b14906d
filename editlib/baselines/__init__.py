"""Baselines: other ways to make a model forget, each tuned with the same budget."""

from editlib.baselines.apply import apply_baseline_to_model
from editlib.baselines.registry import BASELINES, Baseline
from editlib.baselines.search import SearchResult, TrialRun, search
from editlib.baselines.settings import BaselineSettings, Budget
from editlib.baselines.validation import Validation, ValidationSplit, split

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineSettings",
    "Budget",
    "SearchResult",
    "TrialRun",
    "Validation",
    "ValidationSplit",
    "apply_baseline_to_model",
    "search",
    "split",
]
