"""What a run writes at its end, to be looked at: text where the model writes some, and nothing where it does not."""

from typing import Any

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import rng
from gptjax.data import task_formats
from gptjax.decode import fill_mask
from gptjax.decode import generate as decoding
from gptjax.runs import predictions
from gptjax.training.setup import TrainSetup

SHOWN = 5  # held-out examples


def sample(job: TrainSetup, params: Any) -> str:
    """What the model makes of `config.sample.prompt`.

    A decoder goes on from it, an encoder-decoder answers it, and an encoder fills in its masks, if it has any. Where a
    task head learnt from examples, what it says of a few held-out ones.
    """
    c, kind = job.config, models.kind(job.model)
    if c.data.examples.form and task_formats.TASK_FORMATS[c.data.examples.form].objective:
        return _predicted(job, params)
    if kind == "encoder":
        return _filled(job, params) if fill_mask.MASKS.search(c.sample.prompt) else ""
    generator = decoding.generator(job.model, params, job.data.tokenizer, c.model.context)
    requests = [decoding.Request(c.sample.prompt, job.sample_settings, rng.key(c.seed, "sample", 0))]
    _, said = next(decoding.generate(generator, requests, decoding.GenerationConfig(slide=kind == "decoder")))
    return c.sample.prompt + said.text if kind == "decoder" else f"{c.sample.prompt}\n{said.text}"


def _predicted(job: TrainSetup, params: Any) -> str:
    batch = {name: x[:SHOWN] for name, x in job.eval_batches[0].items()}
    found = predictions.in_words(predictions.said(job.model, params, batch), batch, job.config, job.data.tokenizer)
    return predictions.shown(found, batch, job.config, job.data.tokenizer)


def _filled(job: TrainSetup, params: Any) -> str:
    try:
        return fill_mask.fill(job.model, params, job.data.tokenizer, job.config.sample.prompt).lines()
    except (ConfigError, DataError) as error:  # the run is over, and this is no reason to lose it
        return f"no sample: {error}"
