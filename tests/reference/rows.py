"""Values from rows as dense formulas, with no code of editlib."""

import numpy as np


def least_norm(jacobian: np.ndarray, residual: np.ndarray, metric: np.ndarray, ridge: float) -> np.ndarray:
    """`M^-1 A^T (G + ε diag(G))^-1 b`, `G = A M^-1 A^T`, with `M [d, d]` itself, not its root."""
    inverse = np.linalg.inv(metric)
    gram = jacobian @ inverse @ jacobian.T
    gram = gram + ridge * np.diag(np.diag(gram))
    return inverse @ jacobian.T @ np.linalg.inv(gram) @ residual
