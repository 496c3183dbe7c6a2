"""Ranges of numbers in configs, flags and requests: finite, and within int32 or float32."""

import math
from numbers import Integral

INT32 = 2**31 - 1
SEED = 2**32 - 1  # the largest that jax.random.key distinguishes
LARGEST = 1e38  # within the range of float32
SMALLEST = 1e-37  # float32 rounds smaller ones to 0


def range_problem(value: int | float, least: float | None = None, most: float | None = None) -> str:
    """Describes why a number is out of range, such as "it must be at least 1"; "" if it is not.

    Args:
      value: an int or a float.
      least, most: inclusive bounds; by default the range of int32 or float32.
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
    """Formats a number for a message, also one with thousands of digits."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**30:
        return f"a number of {len(str(abs(int(value)))) if abs(int(value)) < 10**4000 else 'thousands of'} digits"
    return str(value)
