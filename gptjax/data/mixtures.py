"""Mixtures: whose row comes next when several sets are read at once. Pure arithmetic on whole numbers."""

import math
from collections.abc import Sequence
from fractions import Fraction

PARTS = 10**9  # into which weights that are no simple fractions of each other are rounded


def shares(weights: Sequence[float], temperature: float = 1.0) -> tuple[int, ...]:
    """Whole numbers in the proportion of weights^(1 / temperature), as small as they can be.

    Args:
      weights: more than 0.
      temperature: above 1 evens the weights out (arXiv 1907.05019 section 3), below 1 sharpens them.
    """
    if temperature == 1.0:
        exact = [Fraction(repr(float(weight))) for weight in weights]  # as it was written: 0.1 is a tenth
    else:
        exact = [Fraction(math.exp(math.log(weight / max(weights)) / temperature)) for weight in weights]
    total = sum(exact)
    multiple = math.lcm(*((weight / total).denominator for weight in exact))
    counts = [max(round(weight / total * min(multiple, PARTS)), 1) for weight in exact]
    return tuple(count // math.gcd(*counts) for count in counts)


def counts_before(rows: int, shares: Sequence[int]) -> list[int]:
    """How many of the first `rows` rows each set gives: its share to within one row for each set before it, at most.

    Each set in turn takes its share, rounded up, of what those before it have left.
    """
    counts, remaining, parts = [], rows, sum(shares)
    for share in shares:
        rest = remaining * (parts - share) // parts
        counts.append(remaining - rest)
        remaining, parts = rest, parts - share
    return counts


def source_of_row(row: int, shares: Sequence[int]) -> tuple[int, int]:
    """Which set gives a row, and how many rows it has given before."""
    before, after = counts_before(row, shares), counts_before(row + 1, shares)
    which = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    return which, before[which]
