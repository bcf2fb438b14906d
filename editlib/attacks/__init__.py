"""Attacks on an edited model: can forgotten facts be recovered from it?"""

import warnings
from typing import Any

from editlib.attacks.outcome import AttackResult, LeakRate, Trial
from editlib.attacks.registry import ATTACKS
from editlib.attacks.run import AttackReport, run_attacks
from editlib.attacks.settings import AttackSettings

__all__ = ["ATTACKS", "AttackReport", "AttackResult", "AttackSettings", "LeakRate", "Trial", "run_attacks"]


def __getattr__(name: str) -> Any:
    if name == "Share":
        warnings.warn("editlib.attacks.Share is now editlib.attacks.LeakRate", DeprecationWarning, stacklevel=2)
        return LeakRate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
