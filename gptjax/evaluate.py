"""python -m gptjax.evaluate --workdir=runs/base: loss, perplexity and bits per byte on held-out or other text.

Flags in, gptjax.evals.held_out called, its figures printed.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from gptjax import command, runtime


def main(argv: Sequence[str]) -> None:
    """Evaluates as the flags say."""
    parser = command.Parser(prog="python -m gptjax.evaluate", description="Measures a trained model on text.")
    parser.add_argument("--workdir", type=Path, required=True, help="a run's directory")
    command.add_step(parser)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; default: the run's held-out split")
    flags = parser.parse_args(argv)
    runtime.start()
    from gptjax import run
    from gptjax.evals import held_out

    figures = held_out.evaluate(run.load(flags.workdir, flags.step), flags.data)
    if flags.json:
        print(json.dumps(figures))
    else:
        print(f"loss            {figures['loss']:.4f} nats per token")
        print(f"perplexity      {figures['perplexity']:.3f} per token")
        print(f"bits per byte   {figures['bits_per_byte']:.4f}")
        print(f"over            {figures['tokens']:,} tokens, {figures['bytes']:,} bytes")


if __name__ == "__main__":
    command.run(main)
