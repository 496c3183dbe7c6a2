"""Prints the output of `gptjax.generate` as it streams: text in the order of the requests, or JSON. Knows no model."""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.decode.engine import Sample
    from gptjax.decode.generate import Request


def write(text: str) -> None:
    """Prints a part of a line and flushes."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Printer:
    """Prints texts in the order of their requests, although they are generated together.

    The first unfinished text streams after its prompt; later ones are buffered. With JSON, each text is one object.
    """

    def __init__(
        self, requests: "Sequence[Request]", facts: Sequence[dict[str, Any]], as_json: bool, answers: bool = False
    ) -> None:
        """Creates a printer.

        Args:
          requests: in the order of printing.
          facts: further entries for the JSON objects of each request.
          as_json: print JSON objects, not text.
          answers: print texts alone, without their prompts.
        """
        self.requests, self.facts, self.as_json = requests, facts, as_json
        self.prompts = ["" if answers else str(request.prompt) for request in requests]
        self.between = "\n" if answers else "\n\n"
        self.position = 0
        self.buffers, self.started = [""] * len(requests), [False] * len(requests)
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self.tokens, self.start, self.first = 0, time.monotonic(), 0.0

    def on_text(self, number: int, text: str) -> None:
        """Takes a part of a text."""
        self.first = self.first or time.monotonic() - self.start
        if not self.started[number]:
            self.started[number], self.buffers[number] = True, self.prompts[number]
        self.buffers[number] += text
        self._show()

    def done(self, number: int, samples: "list[Sample]") -> None:
        """Takes a finished text; the best ones of a search."""
        self.samples[number] = samples
        self.tokens += sum(len(sample.ids) for sample in samples)
        if not self.started[number]:  # a search, or an empty text
            self.buffers[number] = self.between.join(self.prompts[number] + sample.text for sample in samples)
        while self.position < len(self.samples) and self.samples[self.position]:
            self._show()
            for sample in self.samples[self.position] if self.as_json else ():
                print(json.dumps(_object(self.requests[self.position], sample) | self.facts[self.position]), flush=True)
            self.position += 1
            if not self.as_json:
                sys.stdout.write(self.between if self.position < len(self.samples) else "\n")
        self._show()

    def _show(self) -> None:
        if self.position < len(self.buffers) and not self.as_json:
            write(self.buffers[self.position])
            self.buffers[self.position] = ""

    def summary(self) -> str:
        """Returns a line with the number of tokens, the time and the rate."""
        seconds = time.monotonic() - self.start
        first = f"; the first text after {self.first:.2f} s" if self.first else ""
        samples = [sample for samples in self.samples for sample in samples]
        if proposed := sum(sample.proposed for sample in samples):
            accepted = sum(sample.accepted for sample in samples)
            first += f"; {accepted:,} of {proposed:,} proposed tokens accepted, {accepted / proposed:.0%}"
        return f"{self.tokens:,} tokens in {seconds:.1f} s, {self.tokens / seconds:,.1f} tokens/s{first}"


def _object(request: "Request", sample: "Sample") -> dict[str, Any]:
    """Returns a text for --json, without empty entries."""
    entry = {"prompt": request.prompt, **sample._asdict()}
    if not any(sample.alternatives):
        del entry["alternatives"]
    if sample.score is None:
        del entry["score"]
    if not sample.proposed:
        del entry["proposed"], entry["accepted"]
    return entry
