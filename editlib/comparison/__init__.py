"""Methods x seeds x sets: each run once, kept, attacked, and laid side by side in one table and one page."""

from editlib.comparison.config import PROTOCOLS, Config, read_config
from editlib.comparison.method import Cost, Method, Prepared
from editlib.comparison.methods import METHODS
from editlib.comparison.run import compare
from editlib.evaluation.forget_set import Benchmark, ForgetSet, Measure, Scores, Task

Protocol = Benchmark  # its name before 0.2

__all__ = [
    "METHODS",
    "PROTOCOLS",
    "Benchmark",
    "Config",
    "Cost",
    "ForgetSet",
    "Measure",
    "Method",
    "Prepared",
    "Protocol",
    "Scores",
    "Task",
    "compare",
    "read_config",
]
