"""The benchmark of real facts: their selection, questions, scores, protocol and page."""
