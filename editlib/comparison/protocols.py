"""Every protocol by the name that a config gives it."""

from __future__ import annotations

from editlib.comparison.facts_set import Facts
from editlib.comparison.sets import Protocol
from editlib.comparison.tofu_set import Tofu

PROTOCOLS: dict[str, type[Protocol]] = {kind.protocol: kind for kind in (Facts, Tofu)}
