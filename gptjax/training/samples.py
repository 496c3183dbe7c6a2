"""The sample that a run writes at its end."""

from typing import Any

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import rng
from gptjax.data import task_formats
from gptjax.decode import fill_mask
from gptjax.decode import generate as decoding
from gptjax.runs import predictions
from gptjax.training.setup import TrainSetup, sampling_params

SHOWN = 5  # held-out examples


def sample(setup: TrainSetup, params: Any) -> str:
    """Returns a sample for `config.sample.prompt`.

    A decoder continues the prompt, an encoder-decoder answers it, and an encoder fills in its masks, if it has any. A
    model with a task head predicts a few held-out examples instead.
    """
    c, kind = setup.config, models.kind(setup.parts.model)
    if c.data.examples.form and task_formats.TASK_FORMATS[c.data.examples.form].objective:
        return _predicted(setup, params)
    if kind == "encoder":
        return _filled(setup, params) if fill_mask.MASKS.search(c.sample.prompt) else ""
    generator = decoding.generator(setup.parts.model, params, setup.data.tokenizer, c.model.context)
    params_of_sample = sampling_params(c, setup.data.tokenizer)
    requests = [decoding.Request(c.sample.prompt, params_of_sample, rng.key(c.seed, "sample", 0))]
    _, completion = next(
        decoding.generate(generator, requests, decoding.GenerationConfig(sliding_context=kind == "decoder"))
    )
    return c.sample.prompt + completion.text if kind == "decoder" else f"{c.sample.prompt}\n{completion.text}"


def _predicted(setup: TrainSetup, params: Any) -> str:
    batch = {name: x[:SHOWN] for name, x in setup.batches.held_out[0].items()}
    predicted = predictions.to_predictions(
        predictions.head_outputs(setup.parts.model, params, batch), batch, setup.config, setup.data.tokenizer
    )
    return predictions.format_predictions(predicted, batch, setup.config, setup.data.tokenizer)


def _filled(setup: TrainSetup, params: Any) -> str:
    try:
        return fill_mask.fill(setup.parts.model, params, setup.data.tokenizer, setup.config.sample.prompt).lines()
    except (ConfigError, DataError) as error:  # a failed sample must not lose the run
        return f"no sample: {error}"
