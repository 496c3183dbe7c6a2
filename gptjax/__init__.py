"""gptjax: GPT-style language models in JAX and Flax, from text to a trained decoder.

`gptjax.load(workdir)` opens a run in a notebook. Importing this package is cheap: jax is imported on first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from gptjax.runs.run import Run

__version__ = "0.1.0"


def load(workdir: "str | Path", step: int | str | None = None) -> "Run":
    """Opens the run in a directory: `.model .params .tokenizer .config .logits(ids_BT) .generate(...)`.

    Args:
      workdir: directory of the run.
      step: step of the checkpoint; "best": the one with the lowest validation loss; None: the newest.

    Raises:
      gptjax.config.errors.CheckpointError: no run, no such checkpoint, or all checkpoints are damaged.
    """
    from gptjax.core import runtime

    runtime.start()
    from gptjax.runs.run import load as load_run

    return load_run(workdir, step)
