"""Protocols: what is asked of a model before and after an edit, and the ways to ask it."""

from editlib.protocols.facts import FactsProtocol
from editlib.protocols.run import evaluate_models
from editlib.protocols.shape import Protocol, Side
from editlib.protocols.tofu import TofuProtocol

__all__ = ["FactsProtocol", "Protocol", "Side", "TofuProtocol", "evaluate_models"]
