"""python -m gptjax.generate --workdir=runs/base --prompt='def read(': prints text as it is generated.

Flags in, Run.generate called, text or objects printed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gptjax import command, runtime
from gptjax.config import ConfigError


def main(argv: Sequence[str]) -> None:
    """Generates as the flags say."""
    parser = command.Parser(prog="python -m gptjax.generate", description="Continues a prompt with a trained model.")
    parser.add_argument("--workdir", type=Path, required=True, help="a run's directory")
    command.add_step(parser)
    parser.add_argument("--prompt", default="", help="text to go on from; default: the start of a document")
    parser.add_argument("--max_tokens", type=int, default=200, help="the most new tokens per sample (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="draws among the k likeliest; 0: all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="how many continuations (%(default)s)")
    flags = parser.parse_args(argv)
    if flags.samples < 1:
        raise ConfigError(f"samples is {flags.samples}; it must be at least 1")
    runtime.start()
    from gptjax import run

    loaded = run.load(flags.workdir, flags.step)
    settings = dict(max_tokens=flags.max_tokens, temperature=flags.temperature, top_k=flags.top_k)
    for index in range(flags.samples):
        if not flags.json:
            _show(("\n\n" if index else "") + flags.prompt)
        on_text = (lambda text: None) if flags.json else _show
        sample = loaded.generate(flags.prompt, flags.seed, index, on_text, **settings)
        if flags.json:
            print(json.dumps({"prompt": flags.prompt, "index": index, **sample._asdict()}), flush=True)
    if not flags.json:
        print()


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    command.run(main)
