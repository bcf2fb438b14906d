"""Take as much of an edit's work as its requests need: all of it would take a few of them far longer."""

from __future__ import annotations

WHOLE = 24  # requests from which on all of it is used
FEWEST_ANCHORS = 240  # of the bundled prompts, for a single request
FEWEST_READ = 64  # anchors that the left metric is read from


def share_of(whole: int, requests: int, *, fewest: int) -> int:
    """Returns how many of `whole` things so many `requests` need: `requests / WHOLE` of them, rounded up, but at least
    `fewest` and at most all."""
    return min(whole, max(fewest, -(-whole * requests // WHOLE)))
