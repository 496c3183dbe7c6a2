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
from gptjax.decode.beam import Beams
from gptjax.decode.constraints import Grammar
from gptjax.decode.contrastive import Contrastive
from gptjax.decode.drafting import Speculation
from gptjax.decode.engine import Engine, Limits, New, Request, Row, Sample
from gptjax.decode.prefill import Reader
from gptjax.decode.prompts import Prompt, checked_ids, checked_source, prompt_ids, start_ids
from gptjax.decode.settings import Settings
from gptjax.decode.watermark import Watermark

OnText = Callable[[int, str], None]


class Voice(NamedTuple):
    """A model that goes on from text, or, an encoder-decoder, that answers it."""

    reader: Reader
    tokenizer: Tokenizer
    context: int  # the most tokens that it reads at once; an encoder-decoder: of the source, and of its own


class Ask(NamedTuple):
    """One text that is wanted.

    Attributes:
      prompt: text to go on from, or its ids where they are known; empty: the start of a document. Of an
        encoder-decoder, the source.
      settings: how to choose tokens.
      key: decides every draw, with nothing of the other texts.
    """

    prompt: str | tuple[int, ...]
    settings: Settings
    key: jax.Array


class How(NamedTuple):
    """What is the same for all texts that are wanted.

    Attributes:
      rows: how many texts at once; 0: as many as there are, at most 16. With the same rows and room a text is the same,
        bit for bit, alone and among others; with others a sum may be made in another order.
      room: how many ids of a text there is room for, prompt and new ones, and how many of a source; 0: as the longest
        of these texts needs.
      cache_dtype: of keys and values, float32 or bfloat16; "": of the model's arithmetic.
      slide: texts may get longer than the context; see gptjax.decode.engine.Limits.
      alternatives: how many of the likeliest tokens are told at each place.
      watermark: what marks the text.
      grammar: what each text must be.
      guidance: of a model by what it says without the prompt (arXiv 2306.17806); 1: none.
      negative: what it reads instead of the prompt, to be guided away from; None: the prompt's last token, or
        an empty source.
      others: voices that speak too, over the same vocabulary.
      combine, weights: how they do; see gptjax.decode.ensemble.
      speculation: proposes tokens.
      draft: the voice that does, where not n-gram lookup.
      beams, contrastive: search instead of drawing.
    """

    rows: int = 0
    room: int = 0
    cache_dtype: str = ""
    slide: bool = False
    alternatives: int = 0
    watermark: Watermark | None = None
    grammar: Grammar | None = None
    guidance: float = 1.0
    negative: str | None = None
    others: tuple[Voice, ...] = ()
    combine: str = "probabilities"
    weights: tuple[float, ...] = ()
    speculation: Speculation | None = None
    draft: Voice | None = None
    beams: Beams | None = None
    contrastive: Contrastive | None = None


PLAIN = How()
LOOKAHEAD = 64  # batches of a search that are looked at together, for sources of like lengths

# Which parts of How know nothing of each other.
APART = (
    ("beams", "contrastive", "speculation", "slide"),
    ("beams", "contrastive", "speculation", "grammar"),
    ("beams", "contrastive", "speculation", "guidance", "others"),
    ("beams", "contrastive", "speculation", "watermark"),
    ("beams", "contrastive", "speculation", "alternatives"),
    ("guidance", "others", "slide"),
)
# What searches do not read of Settings.
DRAWS = tuple(name for name in Settings._fields if name not in ("max_tokens", "stop", "temperature", "top_k"))


def voice(model: nn.Module, params: Any, tokenizer: Tokenizer, context: int) -> Voice:
    """A Voice of a model as gptjax.models.build gives it."""
    return Voice(prefill.reader(model, params), tokenizer, context)


def divided(options: Mapping[str, Any]) -> tuple[Settings, How]:
    """Options by name as what they are options of.

    Raises:
      ConfigError: one that there is not.
    """
    known = (*Settings._fields, *How._fields)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name}; there are {', '.join(known)}")
    settings = {name: value for name, value in options.items() if name in Settings._fields}
    return Settings(**settings), How(**{name: value for name, value in options.items() if name not in settings})


def check(of: Voice, settings: Settings, how: How) -> None:
    """Raises ConfigError for the first thing that cannot be, or not together with another."""
    for problem in _unfit(of, how):
        raise ConfigError(problem)
    settings.check(of.reader.model.config.vocabulary)
    if how.draft and how.speculation:
        drafting.check_draft(of.reader, how.draft.reader, of.tokenizer, how.draft.tokenizer)
    for part in (how.beams, how.contrastive, how.watermark):
        if part:
            part.check()
    if how.speculation:
        how.speculation.check(how.draft is not None)
    for problems in (_impossible(of, how), _contradictions(settings, how)):
        for problem in problems:
            raise ConfigError(problem)


def _unfit(of: Voice, how: How) -> Iterator[str]:
    """Of what kinds of models cannot do."""
    kind = models.kind(of.reader.model)
    if kind == "encoder":
        yield "this model is an encoder and writes no text; it fills in masks, as in --prompt='The sea is [MASK].'"
    if any(models.kind(other.reader.model) != kind for other in (*how.others, *filter(None, [how.draft]))):
        yield "an encoder-decoder speaks with others only where all of them have an encoder; leave out the others"
    if kind == "seq2seq" and how.slide:
        yield "slide is for decoders; what an encoder-decoder writes is at most as long as its context"
    speaking = (of, how.draft) if how.draft else (of,)
    if how.speculation and any(models.is_recurrent(voice.reader.model.config) for voice in speaking):
        yield "a recurrent model cannot take back what it has read; leave out speculation"


def _impossible(of: Voice, how: How) -> Iterator[str]:
    if how.rows < 0:
        yield f"rows is {how.rows}; it must be at least 1, or 0 for as many as there are"
    if how.room < 0:
        yield f"room is {how.room}; it must be at least 1, or 0 for what the longest text needs"
    if how.cache_dtype not in ("", "float32", "bfloat16"):
        yield f"cache_dtype is {how.cache_dtype!r}; it must be float32 or bfloat16"
    V = of.reader.model.config.vocabulary
    if not 0 <= how.alternatives <= V:
        yield f"alternatives is {how.alternatives}; it must be 0 to {V}"
    if not 0 < how.guidance < float("inf"):
        yield f"guidance is {how.guidance}; it must be a number above 0, and 1 guides nothing"
    if how.speculation and how.speculation.ahead > of.context:
        yield f"{how.speculation.tokens} tokens of speculation are too many for a context of {of.context}"
    if any(tokenizers.sha256(other.tokenizer) != tokenizers.sha256(of.tokenizer) for other in how.others):
        yield "models that speak together must have one tokenizer; train them with the same"


def _contradictions(settings: Settings, how: How) -> Iterator[str]:
    asked = [name for name in How._fields if getattr(how, name) != How._field_defaults[name]]
    for group in APART:
        both = [name for name in group if name in asked]
        if len(both) > 1:
            yield f"{both[0]} and {both[1]} cannot be used together; leave out one of them"
    if how.negative is not None and "guidance" not in asked:
        yield "a negative prompt does nothing without guidance; give both"
    if how.draft and not how.speculation:
        yield "a draft model does nothing without speculation"
    if how.grammar and (settings.no_repeat_ngram or settings.min_tokens):
        yield "no_repeat_ngram and min_tokens may forbid all that a grammar allows; leave them out"
    for name in DRAWS:
        if (how.beams or how.contrastive) and getattr(settings, name) != Settings._field_defaults[name]:
            yield f"{name} does nothing in a search by beams or contrast; leave it out"


def generate(
    of: Voice, asks: Sequence[Ask], how: How = PLAIN, on_text: OnText = lambda number, text: None, stride: int = 0
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
    for settings in {id(ask.settings): ask.settings for ask in asks}.values():
        check(of, settings, how)
    if not asks:
        return
    of, how = keeping(of, how)
    # Who speaks with others can look back no further than they can.
    context = min(voice.context for voice in (of, *how.others))
    prompts = [prompt_of(of, ask.prompt, 0 if how.slide else context) for ask in asks]
    if how.beams or how.contrastive:
        yield from searched(of, asks, prompts, how)
        return
    constraint = None
    if how.grammar:
        constraint = constraints.compile(how.grammar, of.tokenizer, of.reader.model.config.vocabulary)
    negative = None
    if how.guidance != 1 and (of.reader.hears or how.negative is not None):
        negative = prompt_of(of, how.negative or "", 0 if how.slide else context)
    every = [*prompts, negative] if negative else prompts
    longest = max(len(p.ids) + ask.settings.max_tokens for p, ask in zip(prompts, asks, strict=True))
    longest = max(how.room, longest + (len(negative.ids) if negative else 0))
    rows, source = how.rows or min(16, len(asks)), max(len(p.source) for p in every)
    source = source and min(max(how.room, source), context)
    limits = Limits(rows, longest if how.slide else min(longest, context), context, how.slide, source)
    engine = Engine(speaking(of, how), of.tokenizer, limits, how.alternatives, how.watermark, how.speculation)

    def requests() -> Iterable[Request]:
        for prompt, ask in zip(prompts, asks, strict=True):
            read = [prompt] * len(engine.speakers.readers)
            if how.guidance != 1:
                read[1] = negative or Prompt(prompt.ids[-1:])
            sources = tuple(one.source for one in read) if source else ()
            yield Request(tuple(one.ids for one in read), ask.settings, ask.key, constraint, sources)

    yield from engine.answer(requests(), on_text, stride or step.MOST)


def prompt_of(of: Voice, prompt: str | tuple[int, ...], context: int) -> Prompt:
    """What a model reads for a prompt, which for an encoder-decoder is a source.

    Args:
      of: whose model.
      prompt: text or ids.
      context: the most ids that there may be, one new one of a decoder included; 0 for any number.

    Raises:
      ConfigError, DataError: there are none, too many, or some that the model does not have.
    """
    config, ids = of.reader.model.config, models.readable(of.reader.model)
    if not isinstance(prompt, str) and not all(0 <= token < ids for token in prompt):
        raise DataError(f"the prompt has ids that the model does not; they must lie in 0 to {ids - 1}")
    if of.reader.hears:
        source = pairs.source_ids(of.tokenizer, prompt) if isinstance(prompt, str) else prompt
        return Prompt(start_ids(config, of.tokenizer), checked_source(source, context))
    if isinstance(prompt, str):
        return Prompt(prompt_ids(of.tokenizer, prompt, context))
    return Prompt(checked_ids(prompt, context))


def keeping(of: Voice, how: How) -> tuple[Voice, How]:
    """All who speak, with keys and values in the dtype that is wanted."""
    if not how.cache_dtype:
        return of, how

    def kept(voice: Voice) -> Voice:
        return voice._replace(reader=voice.reader._replace(dtype=how.cache_dtype))

    return kept(of), how._replace(draft=how.draft and kept(how.draft), others=tuple(map(kept, how.others)))


def speaking(of: Voice, how: How) -> ensemble.Speakers:
    """Who chooses each token; of speculation, who judges and who proposes."""
    if how.guidance != 1:
        return ensemble.guided(of.reader, how.guidance)
    if how.others:
        return ensemble.together([of.reader, *(other.reader for other in how.others)], how.combine, how.weights)
    return ensemble.Speakers((of.reader, how.draft.reader) if how.draft else (of.reader,))


def searched(of: Voice, asks: Sequence[Ask], prompts: Sequence[Prompt], how: How) -> Iterator[tuple[int, Sample]]:
    """The texts that beams or contrast find; each comes whole, those with sources of about one length together."""
    ends = tokenizers.eos_token_ids(of.tokenizer)
    rows = how.rows or 8
    for _, alike in groupby(range(len(asks)), key=lambda number: asks[number].settings.max_tokens):
        for some in batched(alike, LOOKAHEAD * rows):
            for numbers in batched(sorted(some, key=lambda number: len(prompts[number].source)), rows):
                these, most = [prompts[number].ids for number in numbers], asks[numbers[0]].settings.max_tokens
                sources = [prompts[number].source for number in numbers] if of.reader.hears else []
                found: Sequence[Sequence[Any]]
                if how.beams:
                    found = beam.search(of.reader, these, how.beams, most, ends, rows, sources)
                elif how.contrastive:
                    one_each = contrastive.search(of.reader, these, how.contrastive, most, ends, rows, sources)
                    found = [[one] for one in one_each]
                for number, best in zip(numbers, found, strict=True):
                    for one in best:
                        yield number, as_sample(of.tokenizer, prompts[number], asks[number], one)


def batched(numbers: Iterable[int], n: int) -> Iterator[tuple[int, ...]]:
    """As itertools.batched, which Python 3.11 does not have."""
    rest = iter(numbers)
    while some := tuple(islice(rest, n)):
        yield some


def as_sample(tokenizer: Tokenizer, prompt: Prompt, ask: Ask, found: Any) -> Sample:
    """What a search found, as a text; a stop string in it ends it."""
    row = Row(0, Request((prompt.ids,), ask.settings, ask.key, sources=(prompt.source,) if prompt.source else ()))
    row.feed(tokenizer, New(list(found.ids), list(found.logprobs), [[] for _ in found.ids]))
    row.end("context")
    return row.sample._replace(score=getattr(found, "score", None))
