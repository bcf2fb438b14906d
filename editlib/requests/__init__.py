"""Requests to edit or forget a fact, and the files that they come in."""
