"""From prompts to texts: what can be asked for is checked here, and given to the part of gptjax.decode that does it."""

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
    """A model that goes on from text, or, an encoder-decoder, that answers it."""

    decoder: Decoder
    tokenizer: Tokenizer
    context: int  # the most tokens that it reads at once; an encoder-decoder: of the source, and of its own


class Request(NamedTuple):
    """One text that is wanted.

    Attributes:
      prompt: text to go on from, or its ids where they are known; empty: the start of a document. Of an
        encoder-decoder, the source.
      settings: how to choose tokens.
      key: decides every draw, with nothing of the other texts.
    """

    prompt: str | tuple[int, ...]
    settings: SamplingParams
    key: jax.Array


class GenerationConfig(NamedTuple):
    """What is the same for all texts that are wanted.

    Attributes:
      rows: how many texts at once; 0: as many as there are, at most 16. With the same rows and room a text is the same,
        bit for bit, alone and among others; with others a sum may be made in another order.
      room: how many ids of a text there is room for, prompt and new ones, and how many of a source; 0: as the longest
        of these texts needs.
      cache_dtype: of keys and values, float32 or bfloat16; "": of the model's arithmetic.
      sliding_context: texts may get longer than the context; see gptjax.decode.engine.Limits.
      alternatives: how many of the likeliest tokens are told at each place.
      watermark: what marks the text.
      grammar: what each text must be.
      guidance: of a model by what it says without the prompt (arXiv 2306.17806); 1: none.
      negative: what it reads instead of the prompt, to be guided away from; None: the prompt's last token, or
        an empty source.
      ensemble: further models over the same vocabulary, each of which scores every token.
      combine, weights: how they do; see gptjax.decode.ensemble.
      speculation: proposes tokens.
      draft: the voice that does, where not n-gram lookup.
      beams, contrastive: search instead of drawing.
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
LOOKAHEAD = 64  # batches of a search that are looked at together, for sources of like lengths

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
    """A Voice of a model as gptjax.models.build gives it."""
    return Generator(prefill.decoder(model, params), tokenizer, context)


def split_options(options: Mapping[str, Any]) -> tuple[SamplingParams, GenerationConfig]:
    """Options by name as what they are options of.

    Raises:
      ConfigError: one that there is not.
    """
    known = (*SamplingParams._fields, *GenerationConfig._fields)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name}; there are {', '.join(known)}")
    settings = {name: value for name, value in options.items() if name in SamplingParams._fields}
    return SamplingParams(**settings), GenerationConfig(
        **{name: value for name, value in options.items() if name not in settings}
    )


def check(generator: Generator, settings: SamplingParams, generation: GenerationConfig) -> None:
    """Raises ConfigError for the first thing that cannot be, or not together with another."""
    for problem in _unsupported(generator, generation):
        raise ConfigError(problem)
    settings.check(generator.decoder.model.config.vocabulary)
    if generation.draft and generation.speculation:
        drafting.check_draft(
            generator.decoder, generation.draft.decoder, generator.tokenizer, generation.draft.tokenizer
        )
    for part in (generation.beams, generation.contrastive, generation.watermark):
        if part:
            part.check()
    if generation.speculation:
        generation.speculation.check(generation.draft is not None)
    for problems in (_invalid_values(generator, generation), _contradictions(settings, generation)):
        for problem in problems:
            raise ConfigError(problem)


def _unsupported(generator: Generator, generation: GenerationConfig) -> Iterator[str]:
    """Of what kinds of models cannot do."""
    kind = models.kind(generator.decoder.model)
    if kind == "encoder":
        yield "this model is an encoder and writes no text; it fills in masks, as in --prompt='The sea is [MASK].'"
    if any(
        models.kind(other.decoder.model) != kind for other in (*generation.ensemble, *filter(None, [generation.draft]))
    ):
        yield "an encoder-decoder speaks with others only where all of them have an encoder; leave out the others"
    if kind == "seq2seq" and generation.sliding_context:
        yield "sliding_context is for decoders; what an encoder-decoder writes is at most as long as its context"
    speakers = (generator, generation.draft) if generation.draft else (generator,)
    if generation.speculation and any(models.is_recurrent(one.decoder.model.config) for one in speakers):
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
        yield f"guidance is {generation.guidance}; it must be a number above 0, and 1 guides nothing"
    if generation.speculation and generation.speculation.ahead > generator.context:
        yield f"{generation.speculation.tokens} tokens of speculation are too many for a context of {generator.context}"
    if any(
        tokenizers.sha256(other.tokenizer) != tokenizers.sha256(generator.tokenizer) for other in generation.ensemble
    ):
        yield "models that speak together must have one tokenizer; train them with the same"


def _contradictions(settings: SamplingParams, generation: GenerationConfig) -> Iterator[str]:
    asked = [
        name for name in GenerationConfig._fields if getattr(generation, name) != GenerationConfig._field_defaults[name]
    ]
    for group in INCOMPATIBLE:
        both = [name for name in group if name in asked]
        if len(both) > 1:
            yield f"{both[0]} and {both[1]} cannot be used together; leave out one of them"
    if generation.negative is not None and "guidance" not in asked:
        yield "a negative prompt does nothing without guidance; give both"
    if generation.draft and not generation.speculation:
        yield "a draft model does nothing without speculation"
    if generation.grammar and (settings.no_repeat_ngram or settings.min_tokens):
        yield "no_repeat_ngram and min_tokens may forbid all that a grammar allows; leave them out"
    for name in SAMPLING_FIELDS:
        if (generation.beams or generation.contrastive) and getattr(settings, name) != SamplingParams._field_defaults[
            name
        ]:
            yield f"{name} does nothing in a search by beams or contrast; leave it out"


def generate(
    generator: Generator,
    requests: Sequence[Request],
    generation: GenerationConfig = DEFAULT,
    on_text: OnText = lambda number, text: None,
    stride: int = 0,
) -> Iterator[tuple[int, Sample]]:
    """Yields (which of `asks`, its text) as texts are over; of a search, each of the best in a row.

    Args:
      of: who goes on.
      asks: what is wanted.
      how: what is the same for all.
      on_text: gets each piece of a text as it comes, whole characters only.
      stride: tokens of a row between two of these; 0: many, which costs least.

    Raises:
      ConfigError, DataError: settings or a prompt that cannot be; before anything is generated.
    """
    for settings in {id(request.settings): request.settings for request in requests}.values():
        check(generator, settings, generation)
    if not requests:
        return
    generator, generation = with_cache_dtype(generator, generation)
    # Who speaks with others can look back no further than they can.
    context = min(one.context for one in (generator, *generation.ensemble))
    prompts = [
        encode_prompt(generator, request.prompt, 0 if generation.sliding_context else context) for request in requests
    ]
    if generation.beams or generation.contrastive:
        yield from run_searches(generator, requests, prompts, generation)
        return
    constraint = None
    if generation.grammar:
        constraint = constraints.compile_grammar(
            generation.grammar, generator.tokenizer, generator.decoder.model.config.vocabulary
        )
    negative = None
    if generation.guidance != 1 and (generator.decoder.is_encoder_decoder or generation.negative is not None):
        negative = encode_prompt(generator, generation.negative or "", 0 if generation.sliding_context else context)
    every = [*prompts, negative] if negative else prompts
    longest = max(len(p.ids) + request.settings.max_tokens for p, request in zip(prompts, requests, strict=True))
    longest = max(generation.max_length, longest + (len(negative.ids) if negative else 0))
    batch_size, source = generation.batch_size or min(16, len(requests)), max(len(p.source) for p in every)
    source = source and min(max(generation.max_length, source), context)
    limits = Limits(
        batch_size,
        longest if generation.sliding_context else min(longest, context),
        context,
        generation.sliding_context,
        source,
    )
    engine = Engine(
        build_ensemble(generator, generation),
        generator.tokenizer,
        limits,
        generation.alternatives,
        generation.watermark,
        generation.speculation,
    )

    def engine_requests() -> Iterable[EngineRequest]:
        for prompt, request in zip(prompts, requests, strict=True):
            read = [prompt] * len(engine.ensemble.decoders)
            if generation.guidance != 1:
                read[1] = negative or Prompt(prompt.ids[-1:])
            sources = tuple(one.source for one in read) if source else ()
            yield EngineRequest(tuple(one.ids for one in read), request.settings, request.key, constraint, sources)

    yield from engine.answer(engine_requests(), on_text, stride or step.MAX_STEPS)


def encode_prompt(generator: Generator, prompt: str | tuple[int, ...], context: int) -> Prompt:
    """What a model reads for a prompt, which for an encoder-decoder is a source.

    Args:
      of: whose model.
      prompt: text or ids.
      context: the most ids that there may be, one new one of a decoder included; 0 for any number.

    Raises:
      ConfigError, DataError: there are none, too many, or some that the model does not have.
    """
    config, ids = generator.decoder.model.config, models.readable(generator.decoder.model)
    if not isinstance(prompt, str) and not all(0 <= token < ids for token in prompt):
        raise DataError(f"the prompt has ids that the model does not; they must lie in 0 to {ids - 1}")
    if generator.decoder.is_encoder_decoder:
        source = pairs.source_ids(generator.tokenizer, prompt) if isinstance(prompt, str) else prompt
        return Prompt(start_ids(config, generator.tokenizer), check_source_ids(source, context))
    if isinstance(prompt, str):
        return Prompt(prompt_ids(generator.tokenizer, prompt, context))
    return Prompt(check_prompt_ids(prompt, context))


def with_cache_dtype(generator: Generator, generation: GenerationConfig) -> tuple[Generator, GenerationConfig]:
    """All who speak, with keys and values in the dtype that is wanted."""
    if not generation.cache_dtype:
        return generator, generation

    def with_dtype(one: Generator) -> Generator:
        return one._replace(decoder=one.decoder._replace(dtype=generation.cache_dtype))

    return with_dtype(generator), generation._replace(
        draft=generation.draft and with_dtype(generation.draft), ensemble=tuple(map(with_dtype, generation.ensemble))
    )


def build_ensemble(generator: Generator, generation: GenerationConfig) -> ensemble.Ensemble:
    """Who chooses each token; of speculation, who judges and who proposes."""
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
    """The texts that beams or contrast find; each comes whole, those with sources of about one length together."""
    ends = tokenizers.eos_token_ids(generator.tokenizer)
    batch_size = generation.batch_size or 8
    for _, alike in groupby(range(len(requests)), key=lambda number: requests[number].settings.max_tokens):
        for some in batched(alike, LOOKAHEAD * batch_size):
            for numbers in batched(sorted(some, key=lambda number: len(prompts[number].source)), batch_size):
                these, most = [prompts[number].ids for number in numbers], requests[numbers[0]].settings.max_tokens
                sources = [prompts[number].source for number in numbers] if generator.decoder.is_encoder_decoder else []
                found: Sequence[Sequence[Any]]
                if generation.beams:
                    found = beam.search(generator.decoder, these, generation.beams, most, ends, batch_size, sources)
                elif generation.contrastive:
                    one_each = contrastive.search(
                        generator.decoder, these, generation.contrastive, most, ends, batch_size, sources
                    )
                    found = [[one] for one in one_each]
                for number, best in zip(numbers, found, strict=True):
                    for one in best:
                        yield number, to_sample(generator.tokenizer, prompts[number], requests[number], one)


def batched(numbers: Iterable[int], n: int) -> Iterator[tuple[int, ...]]:
    """As itertools.batched, which Python 3.11 does not have."""
    rest = iter(numbers)
    while some := tuple(islice(rest, n)):
        yield some


def to_sample(tokenizer: Tokenizer, prompt: Prompt, request: Request, found: Any) -> Sample:
    """What a search found, as a text; a stop string in it ends it."""
    row = Slot(
        0,
        EngineRequest((prompt.ids,), request.settings, request.key, sources=(prompt.source,) if prompt.source else ()),
    )
    row.feed(tokenizer, NewTokens(list(found.ids), list(found.logprobs), [[] for _ in found.ids]))
    row.end("context")
    return row.sample._replace(score=getattr(found, "score", None))
