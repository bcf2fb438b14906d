"""Values from rows as dense formulas, with no code of editlib."""

import numpy as np


def least_norm(jacobian: np.ndarray, residual: np.ndarray, metric: np.ndarray, ridge: float) -> np.ndarray:
    """`M^-1 A^T (A M^-1 A^T + ε tr(A M^-1 A^T) / m I)^-1 b` with `M [d, d]` itself, not its root."""
    inverse = np.linalg.inv(metric)
    gram = jacobian @ inverse @ jacobian.T
    gram = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return inverse @ jacobian.T @ np.linalg.inv(gram) @ residual
