"""How edits last: known facts forgotten in chains, batch after batch, by several algorithms side by side."""

from editlib.sequential.run import Point, bench_sequential, check_plan

__all__ = ["Point", "bench_sequential", "check_plan"]
