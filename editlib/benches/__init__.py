"""Benchmarks of algorithms side by side: CounterFact, and facts forgotten in chains."""
