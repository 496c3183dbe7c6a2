"""Report of a preparation: counts of documents and bytes after each step, as JSON and as a table."""

from collections.abc import Sequence
from typing import Any

from gptjax.data.prepare.documents import Outcome

READ = "read"
MAX_REASONS = 10  # most common reasons that are shown


class Report:
    """Counts of documents and bytes of every step.

    Args:
      clean: names of the steps, in order.
      state: result of `state` to continue from, or {}.
    """

    def __init__(self, clean: Sequence[str], state: dict[str, Any]) -> None:
        counts = ("documents_in", "documents_out", "bytes_in", "bytes_out", "changed")
        fresh = [{"step": name} | dict.fromkeys(counts, 0) for name in (READ, *clean)]
        self.steps: list[dict[str, Any]] = state.get("steps", fresh)
        self.reasons: dict[str, dict[str, Any]] = state.get("reasons", {})

    @property
    def documents_out(self) -> int:
        """Number of documents that passed every step."""
        return self.steps[-1]["documents_out"]

    def state(self) -> dict[str, Any]:
        """Returns the counts, for JSON."""
        return {"steps": self.steps, "reasons": self.reasons}

    def add(self, outcome: Outcome) -> None:
        """Adds the counts of a chunk."""
        sizes_M, passed_M = outcome.read_bytes_M, outcome.read_bytes_M >= 0
        for number, step in enumerate(self.steps):
            after_M = outcome.sizes_MS[:, number]
            step["documents_in"] += int(passed_M.sum())
            step["bytes_in"] += int(sizes_M[passed_M].sum())
            passed_M, sizes_M = after_M >= 0, after_M
            step["documents_out"] += int(passed_M.sum())
            step["bytes_out"] += int(sizes_M[passed_M].sum())
            step["changed"] += int(outcome.changed_S[number])
        for drop in outcome.drops:
            name = self.steps[drop.step]["step"]
            counts = self.reasons.setdefault(f"{name}: {drop.reason}", {"documents": 0, "example": drop.example})
            counts["documents"] += 1

    def most_common(self) -> list[dict[str, Any]]:
        """Returns the most common reasons for dropping documents, with an example each."""
        order = sorted(self.reasons.items(), key=lambda item: -item[1]["documents"])
        return [{"reason": reason} | facts for reason, facts in order[:MAX_REASONS]]

    def reasons_line(self) -> str:
        """Returns the most common reasons as one line."""
        return (
            "; ".join(f"{reason['reason']} ({reason['documents']:,})" for reason in self.most_common())
            or "there was none"
        )

    def summary(self, splits: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Returns the whole report.

        Args:
          splits: documents, tokens and bytes of text of each split.
        """
        tokens, size = (sum(side[name] for side in splits.values()) for name in ("tokens", "text_bytes"))
        return {
            "splits": splits,
            "tokens": tokens,
            "bytes_per_token": size / max(tokens, 1),
            "steps": self.steps,
            "dropped": self.most_common(),
        }


def table(report: dict[str, Any]) -> list[str]:
    """Formats the report as lines of a table."""
    lines = [f"{'step':14s} {'documents in':>13s} {'out':>11s} {'MB in':>10s} {'out':>10s} {'changed':>10s}"]
    for step in report["steps"]:
        lines.append(
            f"{step['step']:14s} {step['documents_in']:13,} {step['documents_out']:11,} "
            f"{step['bytes_in'] / 1e6:10,.1f} {step['bytes_out'] / 1e6:10,.1f} {step['changed']:10,}"
        )
    if report["dropped"]:
        lines += ["", "dropped"]
    for reason in report["dropped"]:
        example = " ".join(reason["example"].split())
        lines.append(f"{reason['documents']:10,}  {reason['reason']}: {example[:60]!r}")
    lines.append("")
    for name, side in report["splits"].items():
        lines.append(
            f"{name:9s} {side['documents']:11,} documents {side['tokens']:15,} tokens "
            f"{side['text_bytes'] / 1e6:10,.1f} MB"
        )
    lines.append(f"bytes per token {report['bytes_per_token']:.3f}")
    return lines
