"""Mixtures of several sets: the set of each row. Pure integer arithmetic."""

import math
from collections.abc import Sequence
from fractions import Fraction

PARTS = 10**9  # denominator to which weights that are not simple fractions of each other are rounded


def shares(weights: Sequence[float], temperature: float = 1.0) -> tuple[int, ...]:
    """Returns the smallest integers in the proportion of weights^(1 / temperature).

    Args:
      weights: positive numbers.
      temperature: above 1 evens the weights out (arXiv 1907.05019 section 3), below 1 sharpens them.
    """
    if temperature == 1.0:
        exact = [Fraction(repr(float(weight))) for weight in weights]  # exactly as written: 0.1 is a tenth
    else:
        exact = [Fraction(math.exp(math.log(weight / max(weights)) / temperature)) for weight in weights]
    total = sum(exact)
    multiple = math.lcm(*((weight / total).denominator for weight in exact))
    counts = [max(round(weight / total * min(multiple, PARTS)), 1) for weight in exact]
    return tuple(count // math.gcd(*counts) for count in counts)


def counts_before(rows: int, shares: Sequence[int]) -> list[int]:
    """Returns how many of the first `rows` rows come from each set, exact to one row per set before it.

    Each set in turn takes its share, rounded up, of the rows that the sets before it leave.
    """
    counts, remaining, parts = [], rows, sum(shares)
    for share in shares:
        rest = remaining * (parts - share) // parts
        counts.append(remaining - rest)
        remaining, parts = rest, parts - share
    return counts


def source_of_row(row: int, shares: Sequence[int]) -> tuple[int, int]:
    """Returns the index of the set that gives a row, and the number of rows that set has given before."""
    before, after = counts_before(row, shares), counts_before(row + 1, shares)
    index = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    return index, before[index]
