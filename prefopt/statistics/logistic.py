"""Logistic regression by maximum likelihood, of many resamples at once."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit


def logistic_fit(x: ArrayLike, wins: ArrayLike, games: ArrayLike, ridge: ArrayLike = 0.0) -> NDArray:
    """Coefficients `[..., D]` that maximize, by Newton's method, the concave

        sum_n (wins_n log p_n + (games_n - wins_n) log(1 - p_n)) - sum_d ridge_d beta_d^2 / 2,    p = sigmoid(x beta)

    Args:
        x: `[..., N, D]`; one for all fits, or one for each.
        wins: `[..., N]`, out of `games` each; fractions are fine.
        ridge: of each coefficient.

    >>> beta = logistic_fit([[1.0]], [3.0], [4.0])
    >>> round(float(beta[0]), 6) == round(float(np.log(3)), 6)
    True
    """
    x, wins, games = (np.asarray(array, dtype=float) for array in (x, wins, games))
    shape = np.broadcast_shapes(x.shape[:-2], wins.shape[:-1])
    beta, ridge = np.zeros((*shape, x.shape[-1])), np.broadcast_to(ridge, x.shape[-1:])
    for _ in range(100):
        p = expit((x @ beta[..., None])[..., 0])
        slope = ((wins - games * p)[..., None, :] @ x)[..., 0, :] - ridge * beta
        curvature = np.swapaxes(x * (games * p * (1 - p))[..., None], -1, -2) @ x + np.diag(ridge)
        # a full step overshoots where p is near 0 or 1
        step = np.linalg.solve(curvature, slope[..., None])[..., 0].clip(-1.5, 1.5)
        beta += step
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    return beta
