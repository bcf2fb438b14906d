"""Take a share of an edit's work that grows with its requests: all of it would make an edit of few requests far
slower."""

from __future__ import annotations

WHOLE = 24  # requests from which on everything is used
FEWEST_ANCHORS = 240  # of the bundled prompts, for a single request
FEWEST_READ = 64  # anchors that the left metric is read from


def share_of(whole: int, requests: int, *, fewest: int) -> int:
    """Returns how many of `whole` items this number of `requests` needs: `requests / WHOLE` of them, rounded up, but at
    least `fewest` and at most all."""
    return min(whole, max(fewest, -(-whole * requests // WHOLE)))
