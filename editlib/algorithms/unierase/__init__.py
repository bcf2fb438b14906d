"""UniErase (2505.15674): an unlearning token, and an edit after which the requests' questions are answered with it."""

from editlib.algorithms.unierase.apply import apply_unierase_to_model

__all__ = ["apply_unierase_to_model"]
