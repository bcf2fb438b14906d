"""Measure a model's remaining ability: perplexity on text and tasks of lm-eval, several models side by side."""

from editlib.ability.report import AbilityReport, AbilityRow
from editlib.ability.run import run_ability

__all__ = ["AbilityReport", "AbilityRow", "run_ability"]
