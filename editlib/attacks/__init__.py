"""Attacks on an edited model: can what it was made to forget be brought back?"""

from editlib.attacks.outcome import AttackResult, Share, Trial
from editlib.attacks.registry import ATTACKS
from editlib.attacks.run import AttackReport, run_attacks
from editlib.attacks.settings import AttackSettings

__all__ = ["ATTACKS", "AttackReport", "AttackResult", "AttackSettings", "Share", "Trial", "run_attacks"]
