"""Several models as one, and guidance: against NumPy and against transformers on the same weights."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.core import hub
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import ensemble
from gptjax.decode import generate as decoding
from gptjax.decode.generate import GenerationConfig, Request
from gptjax.decode.settings import SamplingParams
from gptjax.interop import convert_run, families

sys.path.append(str(ROOT / "tests" / "golden"))
import make_beam

CHARS = tokenizers.chars_encoding([chr(65 + i) for i in range(37)])
PROMPT = tuple(make_beam.PROMPT)


@pytest.fixture(scope="module")
def llama():
    """The generator of make_beam's model; its tokenizer has no end, so that texts are of one length."""
    family, config = families.model_of(hub.read_json(make_beam.FOLDER / "config.json"))
    params = convert_run.read_params(make_beam.FOLDER, family, config)
    params["tokens"]["embedding"], head = make_beam.tables()
    params["head"]["kernel"] = head.T
    return decoding.generator(models.build(config), jax.tree.map(jnp.asarray, params), CHARS, config["context"])


@pytest.fixture(scope="module")
def hf_model():
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    model = make_beam.load()
    model.generation_config.eos_token_id = None
    return model


def generator(seed, vocabulary=37, context=32):
    config = tiny_config(model_vocabulary=vocabulary, model_init_std=0.5, model_context=context, model_layers=1)
    model = models.build(config.model)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    tokenizer = tokenizers.chars_encoding([chr(65 + i) for i in range(vocabulary)])
    return decoding.generator(model, params, tokenizer, context)


def generate(of, generation, prompt=PROMPT, **settings):
    """Returns a sample of a generator."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 20} | settings)
    ((_, sample),) = decoding.generate(of, [Request(prompt, params, jax.random.key(0))], generation)
    return sample


def hf_generate(hf_model, prompt=PROMPT, max_tokens=20, **options):
    """Returns the new ids of transformers' greedy text."""
    import torch

    ids = torch.tensor([prompt])
    options |= dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
    return hf_model.generate(ids, **options)[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("negative", [None, (1, 2, 3), (30,) * 12])
def test_guidance_equals_transformers(llama, hf_model, scale, negative):
    import torch

    options = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    generation = GenerationConfig(guidance=scale, negative=None if negative is None else CHARS.decode(negative))
    ids = generate(llama, generation).ids
    assert ids == hf_generate(hf_model, guidance_scale=scale, **options)
    assert ids != generate(llama, GenerationConfig()).ids or scale == 0.5


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings, options",
    [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        (
            {"repetition_penalty": 1.3, "no_repeat_ngram": 3, "logit_bias": {7: 1.5}},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "sequence_bias": [[[7], 1.5]]},
        ),
    ],
)
def test_greedy_with_penalties_equals_transformers(llama, hf_model, settings, options):
    for prompt in (PROMPT, (5,), (7, 30, 2) * 6):
        assert generate(llama, GenerationConfig(), prompt, max_tokens=40, **settings).ids == hf_generate(
            hf_model, prompt, 40, **options
        )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def mixed(combine, logits_MTV, weights):
    """Log-probabilities of the mixture, in NumPy."""
    logprobs_MTV = log_softmax(logits_MTV)
    weights = np.array(weights)[:, None, None] / sum(weights)
    if combine == "logits":
        return log_softmax((weights * logprobs_MTV).sum(0))
    if combine == "token":
        entropy_MT1 = -(np.exp(logprobs_MTV) * logprobs_MTV).sum(-1, keepdims=True)
        weights = weights * np.exp(-entropy_MT1)
        weights = weights / weights.sum(0)
    return np.log((weights * np.exp(logprobs_MTV)).sum(0))


@pytest.mark.slow
@pytest.mark.parametrize("combine", ensemble.COMBINE_FNS)
@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_mixtures_equal_numpy(combine, weights):
    first, second = generator(0), generator(1)
    sample = generate(first, GenerationConfig(ensemble=(second,), combine=combine, weights=weights))
    ids = np.array([[*PROMPT, *sample.ids]])
    logits_MTV = [models.logits(of.decoder.model, of.decoder.params, ids)[0, 7:-1] for of in (first, second)]
    logprobs_TV = mixed(combine, logits_MTV, weights or (1, 1))
    assert sample.ids == logprobs_TV.argmax(-1).tolist()
    np.testing.assert_allclose(sample.logprobs, logprobs_TV.max(-1), atol=1e-4)
    assert sample.ids != generate(first, GenerationConfig()).ids


@pytest.mark.parametrize("combine", ensemble.COMBINE_FNS)
def test_one_model_twice_is_itself(combine):
    of = generator(0)
    twice, alone = generate(of, GenerationConfig(ensemble=(of,), combine=combine)), generate(of, GenerationConfig())
    assert twice.ids == alone.ids
    np.testing.assert_allclose(twice.logprobs, alone.logprobs, atol=1e-5)


def test_the_context_of_an_ensemble_is_the_shortest():
    sample = generate(generator(0), GenerationConfig(ensemble=(generator(1, context=16),)), max_tokens=20)
    assert sample.finish == "context" and len(PROMPT) + len(sample.ids) == 16


@pytest.mark.slow
def test_models_that_do_not_fit_together_are_refused():
    decoders = [generator(0).decoder, generator(1, vocabulary=31).decoder]
    with pytest.raises(ConfigError, match=r"models have different vocabularies \(\[31, 37\] ids\)"):
        ensemble.make_ensemble(decoders, "probabilities")
    with pytest.raises(ConfigError, match="must have one tokenizer"):
        generate(generator(0), GenerationConfig(ensemble=(generator(1, vocabulary=31),)))
    with pytest.raises(ConfigError, match="combine is 'mean'; it must be one of probabilities, logits, token"):
        ensemble.make_ensemble(decoders[:1] * 2, "mean")
    for weights in ((1.0,), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ConfigError, match="there must be a weight above 0 for each of the 2 models"):
            ensemble.make_ensemble(decoders[:1] * 2, "logits", weights)
    with pytest.raises(ConfigError, match="guidance is 0; it must be a number above 0"):
        generate(generator(0), GenerationConfig(guidance=0))
