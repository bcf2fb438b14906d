"""Everything about the benchmark of real facts: which facts, what is asked, how it is scored, and its page."""
