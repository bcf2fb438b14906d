"""Edits that last: a folder of batches that can be resumed, verified and taken back."""

from editlib.chain.chain import Chain

__all__ = ["Chain"]
