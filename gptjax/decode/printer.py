"""What `gptjax.generate` prints while texts come: each in its turn, as text or as objects. Knows no model."""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.decode.engine import Sample
    from gptjax.decode.generate import Request


def write(text: str) -> None:
    """Prints a piece of a line, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Printer:
    """Prints texts in the order in which they were asked for, although they come together.

    The text whose turn it is appears as it comes, after its prompt; others wait. With JSON each is one object.
    """

    def __init__(
        self, requests: "Sequence[Request]", facts: Sequence[dict[str, Any]], as_json: bool, answers: bool = False
    ) -> None:
        """`facts` are for the objects of each of `asks`; `answers`: texts stand alone, without their prompts."""
        self.requests, self.facts, self.as_json = requests, facts, as_json
        self.prompts = ["" if answers else str(request.prompt) for request in requests]
        self.between = "\n" if answers else "\n\n"
        self.at = 0
        self.held, self.begun = [""] * len(requests), [False] * len(requests)
        self.over: list[list[Sample]] = [[] for _ in requests]
        self.tokens, self.start, self.first = 0, time.monotonic(), 0.0

    def on_text(self, number: int, text: str) -> None:
        """A piece of a text came."""
        self.first = self.first or time.monotonic() - self.start
        if not self.begun[number]:
            self.begun[number], self.held[number] = True, self.prompts[number]
        self.held[number] += text
        self._show()

    def done(self, number: int, samples: "list[Sample]") -> None:
        """A text is over; of a search, there are the best ones."""
        self.over[number] = samples
        self.tokens += sum(len(sample.ids) for sample in samples)
        if not self.begun[number]:  # a search, or a text without a character
            self.held[number] = self.between.join(self.prompts[number] + sample.text for sample in samples)
        while self.at < len(self.over) and self.over[self.at]:
            self._show()
            for sample in self.over[self.at] if self.as_json else ():
                print(json.dumps(_object(self.requests[self.at], sample) | self.facts[self.at]), flush=True)
            self.at += 1
            if not self.as_json:
                sys.stdout.write(self.between if self.at < len(self.over) else "\n")
        self._show()

    def _show(self) -> None:
        if self.at < len(self.held) and not self.as_json:
            write(self.held[self.at])
            self.held[self.at] = ""

    def summary(self) -> str:
        """How fast it was."""
        seconds = time.monotonic() - self.start
        first = f"; the first text after {self.first:.2f} s" if self.first else ""
        samples = [sample for samples in self.over for sample in samples]
        if proposed := sum(sample.proposed for sample in samples):
            accepted = sum(sample.accepted for sample in samples)
            first += f"; {accepted:,} of {proposed:,} proposed tokens accepted, {accepted / proposed:.0%}"
        return f"{self.tokens:,} tokens in {seconds:.1f} s, {self.tokens / seconds:,.1f} tokens/s{first}"


def _object(request: "Request", sample: "Sample") -> dict[str, Any]:
    """A text for --json, without what was not asked for."""
    found = {"prompt": request.prompt, **sample._asdict()}
    if not any(sample.alternatives):
        del found["alternatives"]
    if sample.score is None:
        del found["score"]
    if not sample.proposed:
        del found["proposed"], found["accepted"]
    return found
