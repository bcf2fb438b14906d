"""Chains of edits: a folder of batches that can be resumed, verified, undone and revoked."""

from editlib.chain.chain import Chain

__all__ = ["Chain"]
