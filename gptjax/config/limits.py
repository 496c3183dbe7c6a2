"""Numbers that a config, a flag or a request may hold: finite, and of a size that int32 and float32 have room for."""

import math
from numbers import Integral

INT32 = 2**31 - 1
SEED = 2**32 - 1  # the largest that jax.random.key tells apart from a smaller one
LARGEST = 1e38  # of a float, which float32 has room for
SMALLEST = 1e-37  # of a float that is not 0: float32 would make a smaller one 0


def range_problem(value: int | float, least: float | None = None, most: float | None = None) -> str:
    """What is wrong with a number, such as "it must be at least 1"; "" where nothing is.

    Args:
      value: an int or a float.
      least, most: both included; by default what int32 has room for, or float32.
    """
    whole = isinstance(value, Integral)
    if not whole and not math.isfinite(value):
        return "it must be a finite number"
    if least is not None and value < least:
        return "it cannot be negative" if least == 0 else f"it must be at least {least:,}"
    most = (INT32 if whole else LARGEST) if most is None else most
    if value > most or (least is None and value < -most):
        return f"it must be at most {most:,}" if value > most else f"it must be at least {-most:,}"
    return "" if whole or value == 0 or abs(value) >= SMALLEST else f"it must be 0, or at least {SMALLEST:g} in size"


def format_number(value: int | float) -> str:
    """The number for a message, however many digits it has."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**30:
        return f"a number of {len(str(abs(int(value)))) if abs(int(value)) < 10**4000 else 'thousands of'} digits"
    return str(value)
