"""Scaling laws fitted to finished runs: IsoFLOP parabolas, L(N, D) = E + A / N^a + B / D^b. Pure functions of arrays.

Method: arXiv 2203.15556, section 3, approaches 2 and 3. N counts parameters, D tokens, C FLOPs, L nats per token.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

DELTA = 1e-3  # of Huber's loss of log L, as in arXiv 2203.15556, section 3.3
STARTS = list(itertools.product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, 0.0, 1.0), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Nats per token."""
        return np.asarray(self.E + self.A / np.asarray(n) ** self.alpha + self.B / np.asarray(d) ** self.beta)

    def exponents(self) -> tuple[float, float]:
        """Those of C in the best N and the best D (arXiv 2203.15556, eq. 4)."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total


def huber(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray) -> tuple[float, np.ndarray]:
    """The sum of Huber's losses of log L, and its gradient (arXiv 2203.15556, eq. 3).

    Args:
      theta: [5]: log A, log B, log E, alpha, beta.
      log_n: [runs] of parameters.
      log_d: [runs] of tokens.
      log_l: [runs] of losses.
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(0)
    parts = np.exp(terms - top)
    said = top + np.log(parts.sum(0))
    shares = parts / parts.sum(0)
    off = said - log_l
    small = abs(off) <= DELTA
    value = np.where(small, 0.5 * off**2, DELTA * (abs(off) - 0.5 * DELTA)).sum()
    slope = np.clip(off, -DELTA, DELTA)
    by_theta = [shares[0], shares[1], shares[2], -shares[0] * log_n, -shares[1] * log_d]
    return float(value), np.array([(slope * one).sum() for one in by_theta])


def parametric(n: np.ndarray, d: np.ndarray, losses: np.ndarray, starts: list[tuple[float, ...]] | None = None) -> Law:
    """The law with the least Huber loss, by L-BFGS from each start (log A, log B, log E, alpha, beta).

    From all starts a few steps are taken, and from the best ten of them as many as it takes: the surface has few
    valleys, each long and flat.
    """
    logs = np.log(n), np.log(d), np.log(losses)
    # Scaled, so that the optimizer's tolerances, which are absolute, do not end it early.
    scaled = lambda theta: tuple(x / DELTA**2 for x in huber(theta, *logs))

    def lowered(starts: Iterable[Any], steps: int) -> list[Any]:
        options = {"maxiter": steps, "ftol": 1e-12, "gtol": 1e-9}
        found = [optimize.minimize(scaled, start, jac=True, method="L-BFGS-B", options=options) for start in starts]
        return sorted((one for one in found if np.isfinite(one.fun)), key=lambda one: float(one.fun))

    with np.errstate(over="ignore"):
        begun = lowered(starts or STARTS, 50)
        best = lowered((one.x for one in begun[:10]), 2000)[0]
    a, b, e, alpha, beta = best.x
    return Law(*map(float, (np.exp(e), np.exp(a), np.exp(b), alpha, beta)))


def bootstrap(n: np.ndarray, d: np.ndarray, losses: np.ndarray, law: Law, times: int, seed: int = 0) -> list[Law]:
    """Laws of runs drawn with replacement, each fitted from the law of all."""
    rng, found = np.random.default_rng(seed), []
    start = (np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta)
    for _ in range(times):
        drawn = rng.integers(0, len(n), len(n))
        found.append(parametric(n[drawn], d[drawn], losses[drawn], [start]))
    return found


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """The middle share of bootstrapped values."""
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


class Parabola(NamedTuple):
    """L = c0 + c1 x + c2 x^2 with x = log N, of the runs of one budget."""

    c0: float
    c1: float
    c2: float

    @property
    def best(self) -> float | None:
        """The N of the least loss; None where the parabola has none."""
        return float(np.exp(-self.c1 / (2 * self.c2))) if self.c2 > 0 else None

    def loss(self, n: np.ndarray | float) -> np.ndarray:
        """Nats per token."""
        x = np.log(n)
        return np.asarray(self.c0 + self.c1 * x + self.c2 * x**2)


def parabola(n: np.ndarray, losses: np.ndarray) -> Parabola:
    """By least squares; of three sizes or more."""
    c2, c1, c0 = np.polyfit(np.log(n), losses, 2)
    return Parabola(float(c0), float(c1), float(c2))


def power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """k and e of y = k x^e, by least squares of logarithms."""
    e, log_k = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_k)), float(e)
