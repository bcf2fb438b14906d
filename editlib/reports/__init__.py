"""Shared parts of the reports: the page, tables, the summary of the facts protocol, and the page of a receipt."""
