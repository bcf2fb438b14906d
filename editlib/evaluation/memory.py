"""How much memory a measurement took."""

from __future__ import annotations

import resource
import sys


def peak_rss_mb() -> float:
    """The largest memory that this process and its finished children held, in MiB."""
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most / unit
