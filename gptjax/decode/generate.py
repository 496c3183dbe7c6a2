"""Prompts to texts: checks requests and options, and runs the engine or a search."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.data import pairs
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode import beam, constraints, contrastive, drafting, ensemble, prefill, step
from gptjax.decode.beam import BeamSearchParams
from gptjax.decode.constraints import Grammar
from gptjax.decode.contrastive import ContrastiveSearchParams
from gptjax.decode.drafting import SpeculativeConfig
from gptjax.decode.engine import Engine, EngineRequest, Limits, NewTokens, Sample, Slot
from gptjax.decode.prefill import Decoder
from gptjax.decode.prompts import Prompt, check_prompt_ids, check_source_ids, prompt_ids, start_ids
from gptjax.decode.settings import SamplingParams
from gptjax.decode.watermark import Watermark

OnText = Callable[[int, str], None]


class Generator(NamedTuple):
    """A model that continues prompts; an encoder-decoder writes the target of a source."""

    decoder: Decoder
    tokenizer: Tokenizer
    context: int  # maximum number of tokens; for an encoder-decoder, of the source and of the target each


class Request(NamedTuple):
    """A request for one text.

    Attributes:
      prompt: text to continue, or its ids; empty for the start of a document. The source, for an encoder-decoder.
      sampling_params: of this text.
      key: a jax.random key; the samples depend on it alone, not on other requests.
    """

    prompt: str | tuple[int, ...]
    sampling_params: SamplingParams
    key: jax.Array


class GenerationConfig(NamedTuple):
    """Options that all requests of a call share.

    Attributes:
      batch_size: number of texts generated at once; 0: as many as there are, at most 16. With the same `batch_size` and
        `max_length` a text is the same, bit for bit, alone and among others; with other values a sum may be computed in
        another order.
      max_length: number of ids to allocate for a text, prompt and new ones, and for a source; 0: for the longest of
        these texts.
      cache_dtype: of keys and values, float32 or bfloat16; "": that of the model's arithmetic.
      sliding_context: texts may get longer than the context; see gptjax.decode.engine.Limits.
      alternatives: number of most likely tokens returned for each position.
      watermark: to add to the text.
      grammar: that each text must match.
      guidance: scale of classifier-free guidance (arXiv 2306.17806); 1: none.
      negative: negative prompt for guidance; None: the prompt's last token, or an empty source.
      ensemble: further models with the same vocabulary, whose distributions are combined with the model's.
      combine, weights: of the ensemble; see gptjax.decode.ensemble.
      speculation: configuration of speculative decoding.
      draft: the draft model; None with n-gram lookup.
      beams, contrastive: parameters of a search, which replaces sampling.
    """

    batch_size: int = 0
    max_length: int = 0
    cache_dtype: str = ""
    sliding_context: bool = False
    alternatives: int = 0
    watermark: Watermark | None = None
    grammar: Grammar | None = None
    guidance: float = 1.0
    negative: str | None = None
    ensemble: tuple[Generator, ...] = ()
    combine: str = "probabilities"
    weights: tuple[float, ...] = ()
    speculation: SpeculativeConfig | None = None
    draft: Generator | None = None
    beams: BeamSearchParams | None = None
    contrastive: ContrastiveSearchParams | None = None


DEFAULT = GenerationConfig()
LOOKAHEAD = 64  # batches of a search that are sorted together by the length of their sources

# Fields of GenerationConfig that exclude each other.
INCOMPATIBLE = (
    ("beams", "contrastive", "speculation", "sliding_context"),
    ("beams", "contrastive", "speculation", "grammar"),
    ("beams", "contrastive", "speculation", "guidance", "ensemble"),
    ("beams", "contrastive", "speculation", "watermark"),
    ("beams", "contrastive", "speculation", "alternatives"),
    ("guidance", "ensemble", "sliding_context"),
)
# Fields of SamplingParams that searches do not read.
SAMPLING_FIELDS = tuple(
    name for name in SamplingParams._fields if name not in ("max_tokens", "stop", "temperature", "top_k")
)


def generator(model: nn.Module, params: Any, tokenizer: Tokenizer, context: int) -> Generator:
    """Returns the Generator of a model from gptjax.models.build."""
    return Generator(prefill.decoder(model, params), tokenizer, context)


def split_options(options: Mapping[str, Any]) -> tuple[SamplingParams, GenerationConfig]:
    """Splits options by name into sampling parameters and generation config.

    Raises:
      ConfigError: an unknown option.
    """
    names = (*SamplingParams._fields, *GenerationConfig._fields)
    for name in options:
        if name not in names:
            raise ConfigError(f"unknown option {name}; options are {', '.join(names)}")
    sampling_params = {name: value for name, value in options.items() if name in SamplingParams._fields}
    return SamplingParams(**sampling_params), GenerationConfig(
        **{name: value for name, value in options.items() if name not in sampling_params}
    )


def check(generator: Generator, sampling_params: SamplingParams, generation: GenerationConfig) -> None:
    """Raises ConfigError for the first option that is invalid, unsupported, or incompatible with another."""
    for problem in _unsupported(generator, generation):
        raise ConfigError(problem)
    sampling_params.check(generator.decoder.model.config.vocabulary)
    if generation.draft and generation.speculation:
        drafting.check_draft(
            generator.decoder, generation.draft.decoder, generator.tokenizer, generation.draft.tokenizer
        )
    for part in (generation.beams, generation.contrastive, generation.watermark):
        if part:
            part.check()
    if generation.speculation:
        generation.speculation.check(generation.draft is not None)
    for problems in (_invalid_values(generator, generation), _contradictions(sampling_params, generation)):
        for problem in problems:
            raise ConfigError(problem)


def _unsupported(generator: Generator, generation: GenerationConfig) -> Iterator[str]:
    """Yields problems with options that the kind of model does not support."""
    kind = models.kind(generator.decoder.model)
    if kind == "encoder":
        yield "this model is an encoder and writes no text; it fills in masks, as in --prompt='The sea is [MASK].'"
    if any(
        models.kind(other.decoder.model) != kind for other in (*generation.ensemble, *filter(None, [generation.draft]))
    ):
        yield "an encoder-decoder can be combined only with encoder-decoders; leave out the other models"
    if kind == "seq2seq" and generation.sliding_context:
        yield "sliding_context is for decoders; what an encoder-decoder writes is at most as long as its context"
    generators = (generator, generation.draft) if generation.draft else (generator,)
    if generation.speculation and any(models.is_recurrent(one.decoder.model.config) for one in generators):
        yield "a recurrent model cannot take back what it has read; leave out speculation"


def _invalid_values(generator: Generator, generation: GenerationConfig) -> Iterator[str]:
    if generation.batch_size < 0:
        yield f"batch_size is {generation.batch_size}; it must be at least 1, or 0 for as many as there are"
    if generation.max_length < 0:
        yield f"max_length is {generation.max_length}; it must be at least 1, or 0 for what the longest text needs"
    if generation.cache_dtype not in ("", "float32", "bfloat16"):
        yield f"cache_dtype is {generation.cache_dtype!r}; it must be float32 or bfloat16"
    V = generator.decoder.model.config.vocabulary
    if not 0 <= generation.alternatives <= V:
        yield f"alternatives is {generation.alternatives}; it must be 0 to {V}"
    if not 0 < generation.guidance < float("inf"):
        yield f"guidance is {generation.guidance}; it must be a number above 0, and 1 is no guidance"
    if generation.speculation and generation.speculation.lookahead > generator.context:
        yield f"{generation.speculation.tokens} tokens of speculation are too many for a context of {generator.context}"
    if any(
        tokenizers.sha256(other.tokenizer) != tokenizers.sha256(generator.tokenizer) for other in generation.ensemble
    ):
        yield "models of an ensemble must have one tokenizer; train them with the same one"


def _contradictions(sampling_params: SamplingParams, generation: GenerationConfig) -> Iterator[str]:
    changed = [
        name for name in GenerationConfig._fields if getattr(generation, name) != GenerationConfig._field_defaults[name]
    ]
    for group in INCOMPATIBLE:
        both = [name for name in group if name in changed]
        if len(both) > 1:
            yield f"{both[0]} and {both[1]} cannot be used together; leave out one of them"
    if generation.negative is not None and "guidance" not in changed:
        yield "a negative prompt does nothing without guidance; give both"
    if generation.draft and not generation.speculation:
        yield "a draft model does nothing without speculation"
    if generation.grammar and (sampling_params.no_repeat_ngram or sampling_params.min_tokens):
        yield "no_repeat_ngram and min_tokens may forbid all that a grammar allows; leave them out"
    for name in SAMPLING_FIELDS:
        if (generation.beams or generation.contrastive) and getattr(
            sampling_params, name
        ) != SamplingParams._field_defaults[name]:
            yield f"{name} does nothing in a search by beams or contrast; leave it out"


def generate(
    generator: Generator,
    requests: Sequence[Request],
    generation: GenerationConfig = DEFAULT,
    on_text: OnText = lambda number, text: None,
    stride: int = 0,
) -> Iterator[tuple[int, Sample]]:
    """Yields (index into `requests`, its sample) as texts end; of a search, each of the best in a row.

    Args:
      generator: the model.
      requests: texts to generate.
      generation: options that all requests share.
      on_text: called with the index of a request and each new part of its text, whole characters only.
      stride: number of tokens of a row between two such calls; 0: many, which is fastest.

    Raises:
      ConfigError, DataError: invalid options or an invalid prompt; raised before anything is generated.
    """
    for sampling_params in {id(request.sampling_params): request.sampling_params for request in requests}.values():
        check(generator, sampling_params, generation)
    if not requests:
        return
    generator, generation = with_cache_dtype(generator, generation)
    # The context of an ensemble is the shortest one.
    context = min(one.context for one in (generator, *generation.ensemble))
    sliding, tokenizer = generation.sliding_context, generator.tokenizer
    max_ids = 0 if sliding else context
    prompts = [encode_prompt(generator, request.prompt, max_ids) for request in requests]
    if generation.beams or generation.contrastive:
        yield from run_searches(generator, requests, prompts, generation)
        return
    constraint = None
    if generation.grammar:
        V = generator.decoder.model.config.vocabulary
        constraint = constraints.compile_grammar(generation.grammar, tokenizer, V)
    negative = None
    if generation.guidance != 1 and (generator.decoder.is_encoder_decoder or generation.negative is not None):
        negative = encode_prompt(generator, generation.negative or "", max_ids)
    all_prompts = [*prompts, negative] if negative else prompts
    longest = max(len(p.ids) + request.sampling_params.max_tokens for p, request in zip(prompts, requests, strict=True))
    longest = max(generation.max_length, longest + (len(negative.ids) if negative else 0))
    batch_size, source = generation.batch_size or min(16, len(requests)), max(len(p.source) for p in all_prompts)
    source = source and min(max(generation.max_length, source), context)
    limits = Limits(batch_size, longest if sliding else min(longest, context), context, sliding, source)
    combined = build_ensemble(generator, generation)
    engine = Engine(combined, tokenizer, limits, generation.alternatives, generation.watermark, generation.speculation)

    def engine_requests() -> Iterable[EngineRequest]:
        for prompt, request in zip(prompts, requests, strict=True):
            inputs = [prompt] * len(engine.ensemble.decoders)
            if generation.guidance != 1:
                inputs[1] = negative or Prompt(prompt.ids[-1:])
            sources = tuple(one.source for one in inputs) if source else ()
            ids = tuple(one.ids for one in inputs)
            yield EngineRequest(ids, request.sampling_params, request.key, constraint, sources)

    yield from engine.generate(engine_requests(), on_text, stride or step.MAX_STEPS)


def encode_prompt(generator: Generator, prompt: str | tuple[int, ...], context: int) -> Prompt:
    """Returns the ids of a prompt; for an encoder-decoder the prompt is the source.

    Args:
      generator: the model.
      prompt: text or ids.
      context: maximum number of ids, one new one of a decoder included; 0 for no maximum.

    Raises:
      ConfigError, DataError: there are no ids, too many, or ids outside the model's vocabulary.
    """
    config, ids = generator.decoder.model.config, models.num_embeddings(generator.decoder.model)
    if not isinstance(prompt, str) and not all(0 <= token < ids for token in prompt):
        raise DataError(f"the prompt has ids that the model does not; they must lie in 0 to {ids - 1}")
    if generator.decoder.is_encoder_decoder:
        source = pairs.source_ids(generator.tokenizer, prompt) if isinstance(prompt, str) else prompt
        return Prompt(start_ids(config, generator.tokenizer), check_source_ids(source, context))
    if isinstance(prompt, str):
        return Prompt(prompt_ids(generator.tokenizer, prompt, context))
    return Prompt(check_prompt_ids(prompt, context))


def with_cache_dtype(generator: Generator, generation: GenerationConfig) -> tuple[Generator, GenerationConfig]:
    """Returns the model, and the config with its other models, with the cache dtype of the config."""
    if not generation.cache_dtype:
        return generator, generation

    def with_dtype(one: Generator) -> Generator:
        return one._replace(decoder=one.decoder._replace(dtype=generation.cache_dtype))

    return with_dtype(generator), generation._replace(
        draft=generation.draft and with_dtype(generation.draft), ensemble=tuple(map(with_dtype, generation.ensemble))
    )


def build_ensemble(generator: Generator, generation: GenerationConfig) -> ensemble.Ensemble:
    """Returns the models whose distributions are combined; with speculation, the model and its draft model."""
    if generation.guidance != 1:
        return ensemble.with_guidance(generator.decoder, generation.guidance)
    if generation.ensemble:
        return ensemble.make_ensemble(
            [generator.decoder, *(other.decoder for other in generation.ensemble)],
            generation.combine,
            generation.weights,
        )
    return ensemble.Ensemble(
        (generator.decoder, generation.draft.decoder) if generation.draft else (generator.decoder,)
    )


def run_searches(
    generator: Generator, requests: Sequence[Request], prompts: Sequence[Prompt], generation: GenerationConfig
) -> Iterator[tuple[int, Sample]]:
    """Yields the texts of beam or contrastive search; texts with sources of similar length share a batch."""
    ends = tokenizers.eos_token_ids(generator.tokenizer)
    batch_size = generation.batch_size or 8
    for _, alike in groupby(range(len(requests)), key=lambda number: requests[number].sampling_params.max_tokens):
        for group in batched(alike, LOOKAHEAD * batch_size):
            for numbers in batched(sorted(group, key=lambda number: len(prompts[number].source)), batch_size):
                ids = [prompts[number].ids for number in numbers]
                max_tokens = requests[numbers[0]].sampling_params.max_tokens
                sources = [prompts[number].source for number in numbers] if generator.decoder.is_encoder_decoder else []
                hypotheses: Sequence[Sequence[Any]]
                if generation.beams:
                    hypotheses = beam.search(
                        generator.decoder, ids, generation.beams, max_tokens, ends, batch_size, sources
                    )
                elif generation.contrastive:
                    completions = contrastive.search(
                        generator.decoder, ids, generation.contrastive, max_tokens, ends, batch_size, sources
                    )
                    hypotheses = [[one] for one in completions]
                for number, best in zip(numbers, hypotheses, strict=True):
                    for one in best:
                        yield number, to_sample(generator.tokenizer, prompts[number], requests[number], one)


def batched(numbers: Iterable[int], n: int) -> Iterator[tuple[int, ...]]:
    """Equals itertools.batched, which Python 3.11 does not have."""
    rest = iter(numbers)
    while batch := tuple(islice(rest, n)):
        yield batch


def to_sample(tokenizer: Tokenizer, prompt: Prompt, request: Request, hypothesis: Any) -> Sample:
    """Converts a hypothesis of a search to a Sample; a stop string in it ends it."""
    sources = (prompt.source,) if prompt.source else ()
    row = Slot(0, EngineRequest((prompt.ids,), request.sampling_params, request.key, sources=sources))
    row.feed(tokenizer, NewTokens(list(hypothesis.ids), list(hypothesis.logprobs), [[] for _ in hypothesis.ids]))
    row.end("context")
    return row.sample._replace(score=getattr(hypothesis, "score", None))
