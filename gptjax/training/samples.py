"""What a run writes at its end, to be looked at: text where the model writes some, and nothing where it does not."""

from typing import Any

from gptjax import models, random
from gptjax.decode import generate as decoding
from gptjax.training.job import Job


def sample(job: Job, params: Any) -> str:
    """What the model makes of `config.sample.prompt`: a text that begins with it; of an encoder-decoder, its answer."""
    c, kind = job.config, models.kind(job.model)
    if kind == "encoder":
        return ""
    voice = decoding.voice(job.model, params, job.data.tokenizer, c.model.context)
    asks = [decoding.Ask(c.sample.prompt, job.sample_settings, random.key(c.seed, "sample", 0))]
    _, said = next(decoding.generate(voice, asks, decoding.How(slide=kind == "decoder")))
    return c.sample.prompt + said.text if kind == "decoder" else f"{c.sample.prompt}\n{said.text}"
