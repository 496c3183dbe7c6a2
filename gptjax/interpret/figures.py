"""Figures of what gptjax.interpret finds, each a matplotlib Figure to be shown or saved. Runs no model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.data.tokenizers.specials import decode_with_specials
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.interpret.lens import Guesses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.5  # inches, a notebook's
SHADES, BOTH_WAYS = "viridis", "RdBu_r"


def words(tokenizer: Tokenizer, ids_T: Any) -> list[str]:
    """Tokens as axes show them: spaces and line breaks can be seen."""
    shown = {" ": "␣", "\n": "⏎", "\t": "⇥"}

    def seen(c: str) -> str:
        return shown.get(c, c if c.isprintable() else "·")

    return ["".join(map(seen, decode_with_specials(tokenizer, [int(token)]))) or "·" for token in np.ravel(ids_T)]


def words_beside(tokenizer: Tokenizer, ids_T: Any, numbers_T: Any, form: str = ".2f") -> str:
    """One line of tokens, each with its number."""
    return "  ".join(f"{word} {x:{form}}" for word, x in zip(words(tokenizer, ids_T), numbers_T, strict=True))


def examples(tokenizer: Tokenizer, ids_BT: Any, rows: Any, positions: Any, before: int = 4) -> str:
    """Places in texts on one line: each token in brackets, behind those before it; of one neuron's `Examples`."""
    ids_BT = np.asarray(ids_BT)

    def place(row: int, position: int) -> str:
        *led, last = words(tokenizer, ids_BT[row, max(position - before, 0) : position + 1])
        return f"{''.join(led)}[{last}]"

    return " | ".join(place(*at) for at in zip(rows, positions, strict=True))


def attention(weights_HTT: Any, tokens: Sequence[str], title: str = "") -> "Figure":
    """A heat map a head of one layer: what reads goes down, what is read goes across; shades from 0 to 1."""
    weights = np.asarray(weights_HTT)
    across = min(len(weights), 4 if len(tokens) <= 12 else 2)
    down = -(-len(weights) // across)
    side = WIDTH / across
    figure, panels = _panels(down, across, side * down + 0.6)
    for number, axes in enumerate(panels):
        if number >= len(weights):
            axes.set_axis_off()
            continue
        image = axes.imshow(weights[number], cmap=SHADES, vmin=0, vmax=1)
        axes.set_title(f"head {number}", fontsize=10)
        _ticks(axes, tokens if number % across == 0 else None, tokens, side)
    panels[0].set_ylabel("reading token")
    panels[0].set_xlabel("token that is read")
    figure.colorbar(image, ax=panels, shrink=0.8, label="attention weight")
    figure.suptitle(title)
    return figure


def grid(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    title: str = "",
    across: str = "position",
    most: float | None = None,
) -> "Figure":
    """A heat map of numbers of both signs, white for 0: patches by site and position, heads by layer and number.

    `most` is the number of the darkest shade; None: the largest there is.
    """
    values = np.asarray(values)
    most = most or float(np.abs(values).max()) or 1.0
    figure, (axes,) = _panels(1, 1, 1.6 + 0.32 * len(rows))
    image = axes.imshow(values, cmap=BOTH_WAYS, vmin=-most, vmax=most, aspect="auto")
    _ticks(axes, rows, columns, WIDTH)
    axes.set(xlabel=across, title=title)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def heads(values_LH: Any, label: str, title: str = "", most: float | None = None) -> "Figure":
    """A number for each head, such as its induction score, written into its cell; `most` as of `grid`."""
    values = np.asarray(values_LH)
    most = most or float(np.abs(values).max()) or 1.0
    names = [f"layer {i}" for i in range(len(values))], [f"{h}" for h in range(values.shape[1])]
    figure = grid(values, *names, label, title, "head", most)
    if values.shape[1] <= 16:
        _written(figure.axes[0], [[f"{x:.2f}" for x in row] for row in values], values / most)
    return figure


def lens(found: Guesses, guessed: Sequence[Sequence[str]], tokens: Sequence[str], title: str = "") -> "Figure":
    """The logit lens as a table: the likeliest next token by depth, the last layer at the top; shades: probability.

    Args:
      found: as gptjax.interpret.lens.guesses gives it.
      guessed: its tokens as words, [L, T].
      tokens: that are read, T.
      title: over the table.
    """
    shades = found.probabilities_LT[::-1]
    rows = ["embedding", *(f"block {i}" for i in range(len(shades) - 1))][::-1]
    figure, (axes,) = _panels(1, 1, 1.6 + 0.36 * len(rows))
    image = axes.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    _written(axes, list(guessed)[::-1], shades)
    _ticks(axes, rows, tokens, WIDTH)
    axes.set(xlabel="token that is read", title=title)
    figure.colorbar(image, ax=axes, label="probability of the likeliest")
    return figure


def losses(nats_T: Any, tokens: Sequence[str], title: str = "") -> "Figure":
    """How much each token of a text surprises, a bar each; `tokens` are those after the first."""
    figure, (axes,) = _panels(1, 1, 3.2)
    axes.bar(range(len(tokens)), np.asarray(nats_T), color="tab:blue")
    _names_across(axes, tokens, WIDTH)
    axes.set(ylabel="loss (nats)", xlabel="token that comes next", title=title, xlim=(-0.6, len(tokens) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def curves(
    lines: Mapping[str, tuple[Any, Any]], across: str, label: str, title: str = "", scale: str = "linear"
) -> "Figure":
    """Lines of x and y by name; what has few points has dots. `scale`: of what is drawn upwards, linear or log."""
    figure, (axes,) = _panels(1, 1, 3.8)
    for (name, (x, y)), colour in zip(lines.items(), colours(len(lines)), strict=True):
        axes.plot(x, y, label=name, color=colour, linewidth=1.3, marker="o" if len(x) <= 30 else "", markersize=3.5)
    axes.set(xlabel=across, ylabel=label, title=title, yscale=scale)
    axes.grid(alpha=0.3)
    _names_beside(axes)
    return figure


def bars(values: Mapping[str, float], label: str, title: str = "") -> "Figure":
    """A bar across for each name, the first at the top, with its number beside it."""
    figure, (axes,) = _panels(1, 1, 1 + 0.22 * len(values))
    drawn = axes.barh(list(values), list(values.values()), color="tab:blue")
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def spectra(values: Mapping[str, Any], title: str = "") -> "Figure":
    """Singular values of each matrix, the largest first, both scales logarithmic."""
    figure, (axes,) = _panels(1, 1, 4.2)
    for (name, own), colour in zip(values.items(), colours(len(values)), strict=True):
        axes.plot(np.arange(1, len(own) + 1), own, label=name, color=colour, linewidth=1.3)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="singular value", title=title)
    axes.grid(alpha=0.3, which="both")
    _names_beside(axes)
    return figure


def histogram(values: Mapping[str, Any], label: str = "value", title: str = "", bins: int = 80) -> "Figure":
    """Densities of some arrays' numbers, one line each, between the outermost thousandths of all."""
    flat = {name: np.ravel(np.asarray(x)) for name, x in values.items()}
    low, high = np.quantile(np.concatenate(list(flat.values())), [0.001, 0.999])
    edges = np.linspace(low, high, bins + 1) if high > low else np.array([low - 0.5, low + 0.5])
    figure, (axes,) = _panels(1, 1, 3.8)
    for (name, own), colour in zip(flat.items(), colours(len(flat)), strict=True):
        counts, _ = np.histogram(own, edges)
        density = counts / (own.size * np.diff(edges))
        axes.stairs(density, edges, label=name, color=colour, linewidth=1.3)
    axes.set(xlabel=label, ylabel="density", title=title)
    axes.grid(alpha=0.3)
    _names_beside(axes)
    return figure


def colours(count: int) -> Any:
    """For so many lines, [count, 4]: those that are easily told apart while there are enough of them."""
    from matplotlib import colormaps

    if count <= 20:
        return colormaps["tab10" if count <= 10 else "tab20"](np.arange(count))
    return colormaps[SHADES](np.linspace(0, 0.95, count))


def _panels(down: int, across: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=100)
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def _size(labels: Sequence[str], inches: float) -> float:
    """Of letters that fit side by side on an axis of so many inches."""
    return float(np.clip(72 * inches / max(len(labels), 1) * 0.6, 4, 9))


def _names_beside(axes: "Axes") -> None:
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _names_across(axes: "Axes", columns: Sequence[str], inches: float) -> None:
    longest = max((len(name) for name in columns), default=1)
    turn = 0 if longest * len(columns) < 9 * inches else 90
    axes.set_xticks(range(len(columns)), columns, rotation=turn, fontsize=_size(columns, inches))


def _ticks(axes: "Axes", rows: Sequence[str] | None, columns: Sequence[str], inches: float) -> None:
    _names_across(axes, columns, inches)
    if rows is None:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(len(rows)), rows, fontsize=min(9.0, _size(rows, inches) + 1))


def _written(axes: "Axes", cells: Sequence[Sequence[str]], shades: Any) -> None:
    size = _size(cells[0], WIDTH * 0.8)
    for y, row in enumerate(cells):
        for x, text in enumerate(row):
            colour = "white" if abs(shades[y][x]) > 0.55 else "black"
            axes.text(x, y, text[:8], ha="center", va="center", fontsize=size, color=colour)
