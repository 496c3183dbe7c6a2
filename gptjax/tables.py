"""Tables in plain text, for terminals and notebooks. Knows nothing of what they say."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]  # the first has the columns' names


def aligned(rows: Rows) -> list[str]:
    """Rows of the same length as lines with columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
