"""python -m gptjax.generate --workdir=runs/base --prompt='def read(': prints text as it is generated.

One prompt, a file of them (--prompts, a batch), or a dialogue (--chat). Of an encoder-decoder a prompt is the source,
and what it makes of it is printed alone, a line each; an encoder fills in the prompt's masks. Flags in, Run.answers or
Run.fill called, text or objects printed.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config import limits
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import arguments, console, cpu_idle, runtime
from gptjax.core.files import decode, read_text, replace_surrogates
from gptjax.decode import printer

if TYPE_CHECKING:
    from gptjax.decode.engine import Sample
    from gptjax.decode.generate import GenerationConfig
    from gptjax.decode.settings import SamplingParams
    from gptjax.runs.run import Run

MOST_SAMPLES = 1_000_000  # of a prompt, all of which are in memory at once
LIVE = 8  # tokens between two looks at a text that somebody watches


def flags_of(argv: Sequence[str]) -> Any:
    """The flags, none of them looked at."""
    parser = arguments.Parser(prog="python -m gptjax.generate", description="Continues a prompt with a trained model.")
    add, given = parser.add_argument, parser.add_argument_group
    add("--workdir", type=Path, required=True, help="a run's directory")
    arguments.add_step(parser)
    add("--prompt", help="text to go on from (the start of a document), to translate, or whose [MASK]s to fill in")
    add("--prompts", help="a file of prompts: one a line, JSON or not, or records with a prompt; - for stdin")
    add("--chat", action="store_true", help="a dialogue: a line from stdin, an answer; /reset forgets, /exit ends")
    add("--chat_template", type=Path, help="a file with a chat template, for a run that has none")
    add("--system", help="what a dialogue begins with")
    add(
        "--samples",
        type=arguments.number(most=MOST_SAMPLES),
        default=1,
        help="how many continuations of each prompt (%(default)s)",
    )
    add(
        "--seed",
        type=arguments.number(least=0, most=limits.SEED),
        default=0,
        help="the same seed gives the same text (%(default)s)",
    )
    add(
        "--rows", type=arguments.number(), default=0, help="how many texts at once; 0: as many as there are, at most 16"
    )
    add(
        "--room",
        type=arguments.number(),
        default=0,
        help="for how many tokens of a text; 0: as the longest of these needs",
    )
    add("--cache_dtype", choices=["float32", "bfloat16"], help="of keys and values; default: the arithmetic's")
    add("--slide", action="store_true", help="texts may be longer than the context: its newest tokens are read")
    add("--logprobs", type=arguments.number(), metavar="N", help="with --json: the N likeliest tokens at each place")
    add("--prompt_logprobs", action="store_true", help="with --json: log-probabilities of the prompt's tokens")
    _add_choice(given)
    _add_models(given)
    _add_searches(given)
    flags = parser.parse_args(argv)
    _depends(flags, "chat", "chat_template", "system")
    _depends(flags, "json", "logprobs", "prompt_logprobs")
    return flags


def _add_choice(given: Any) -> None:
    of_choice = given("how a token is chosen", "filters in this order, each after its predecessors")
    choose = of_choice.add_argument
    choose("--max_tokens", type=arguments.number(), help="the most new tokens of a text (200)")
    choose("--temperature", type=arguments.number(float), help="0 takes the likeliest token (0.8)")
    choose("--top_k", type=arguments.number(), help="draws among the k likeliest; 0: all (50); fillings of a mask (5)")
    choose(
        "--top_p",
        type=arguments.number(float),
        help="draws among the likeliest that make up this probability; 1: all (1)",
    )
    choose(
        "--min_p",
        type=arguments.number(float),
        help="draws among those at least this likely, the likeliest being 1; 0: all (0)",
    )
    choose(
        "--typical_p",
        type=arguments.number(float),
        help="draws among the nearest to the entropy of this probability; 1: all (1)",
    )
    choose("--repetition_penalty", type=arguments.number(float), help="for tokens of prompt and text; 1: none (1)")
    choose("--frequency_penalty", type=arguments.number(float), help="nats for each time that the text has a token (0)")
    choose("--presence_penalty", type=arguments.number(float), help="nats for tokens that the text has (0)")
    choose("--no_repeat_ngram", type=arguments.number(), help="no so many tokens in a row come twice; 0: they may (0)")
    choose("--logit_bias", action="append", metavar="ID=NATS", help="added to a token's logit; may be repeated")
    choose("--min_tokens", type=arguments.number(), help="the text does not end before (0)")
    choose("--stop", action="append", help="text ends before this string; may be repeated")

    held = given("what the text must be (pip install 'gptjax[constraints]')").add_argument
    held("--regex", help="the whole text matches")
    held("--json_schema", help="JSON that the schema accepts; a file or the schema itself")
    held("--choice", action="append", help="one of these texts; repeated")


def _add_models(given: Any) -> None:
    several = given("several models, or one beside itself").add_argument
    several("--with", dest="others", action="append", type=Path, help="a run that speaks too; may be repeated")
    several("--combine", help="probabilities (default): their mean; logits: theirs; token: who is surer counts more")
    several("--weights", help="of each model, the first run's first, as in 2,1")
    several(
        "--guidance", type=arguments.number(float), help="away from what the model says without the prompt; 1: none (1)"
    )
    several("--negative_prompt", help="what it reads instead of the prompt then")

    quick = given("speculation: the same text, sooner").add_argument
    quick("--draft", type=Path, help="a smaller run with the same tokenizer, which proposes tokens")
    quick("--ngram", type=arguments.number(), help="or: proposes what followed up to so many last tokens before")
    quick("--draft_tokens", type=arguments.number(), help="proposals at a time (4)")


def _add_searches(given: Any) -> None:
    search = given("search instead of drawing").add_argument
    search("--beams", type=arguments.number(), help="beam search with so many")
    search(
        "--groups", type=arguments.number(), help="into which beams are divided, each avoiding the others' tokens (1)"
    )
    search("--diversity_penalty", type=arguments.number(float), help="how much (0)")
    search("--length_penalty", type=arguments.number(float), help="above 0 for longer texts (1)")
    search("--early_stopping", choices=["true", "false", "never"], help="when a search ends (false)")
    search("--best", type=arguments.number(), help="how many of the beams are given (1)")
    search("--contrastive_k", type=arguments.number(), help="contrastive search among so many tokens")
    search("--contrastive_alpha", type=arguments.number(float), help="weight of what the text has not said (0.6)")

    mark = given("watermark").add_argument
    mark(
        "--watermark",
        type=arguments.number(least=0, most=2**64 - 1),
        metavar="KEY",
        help="marks the text; whoever has the key can tell",
    )
    mark("--watermark_gamma", type=arguments.number(float), help="share of green tokens (0.25)")
    mark("--watermark_delta", type=arguments.number(float), help="nats that they gain (2)")
    mark("--detect", metavar="FILE", help="tells whether this text has the watermark; - for stdin")


def _given(flags: Any, **names: str) -> dict[str, Any]:
    """The values of the flags that were given, by the names that they have elsewhere."""
    return {name: getattr(flags, flag) for name, flag in names.items() if getattr(flags, flag) is not None}


def _settings(flags: Any) -> "SamplingParams":
    from gptjax.decode.settings import SamplingParams

    given = _given(flags, **{name: name for name in SamplingParams._fields})
    given["stop"] = tuple(given.get("stop", ()))
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    if given.get("temperature") == 0 and flags.top_k:
        raise ConfigError(f"top_k={flags.top_k} does nothing at temperature 0, which takes the likeliest; leave it out")
    if flags.beams or flags.contrastive_k:
        for name in ("temperature", "top_k"):
            if name in given:
                raise ConfigError(f"{name} does nothing in a search by beams or contrast; leave it out")
    return SamplingParams(**given)


def _bias(text: str) -> tuple[int, float]:
    token, _, nats = text.partition("=")
    try:
        return int(token), float(nats)
    except ValueError:
        raise ConfigError(f"--logit_bias={text} is not ID=NATS, such as 50=-2.5") from None


def _depends(flags: Any, on: str, *names: str) -> None:
    """Raises ConfigError where one of these flags is given without the one that it belongs to."""

    def is_given(name: str) -> bool:
        value = getattr(flags, name)
        return value is not None and value is not False

    for name in names:
        if is_given(name) and not is_given(on):
            raise ConfigError(f"--{name} does nothing without --{'with' if on == 'others' else on}")


def _how(flags: Any) -> "GenerationConfig":
    from gptjax.decode.beam import Beams
    from gptjax.decode.contrastive import Contrastive
    from gptjax.decode.drafting import Speculation
    from gptjax.decode.generate import GenerationConfig
    from gptjax.decode.watermark import Watermark
    from gptjax.runs import run

    _depends(flags, "beams", "groups", "diversity_penalty", "length_penalty", "early_stopping", "best")
    _depends(flags, "contrastive_k", "contrastive_alpha")
    _depends(flags, "watermark", "watermark_gamma", "watermark_delta", "detect")
    _depends(flags, "others", "combine", "weights")
    generation: dict[str, Any] = _given(
        flags, guidance="guidance", negative="negative_prompt", alternatives="logprobs", cache_dtype="cache_dtype"
    )
    generation |= _given(flags, combine="combine")
    if flags.beams is not None:
        names = ("beams", "groups", "diversity_penalty", "length_penalty", "best")
        stopping: Any = {"true": True, "false": False, "never": "never", None: False}[flags.early_stopping]
        generation["beams"] = Beams(**_given(flags, **{name: name for name in names}), early_stopping=stopping)
    if flags.contrastive_k is not None:
        generation["contrastive"] = Contrastive(**_given(flags, k="contrastive_k", alpha="contrastive_alpha"))
    if flags.watermark is not None:
        generation["watermark"] = Watermark(
            **_given(flags, key="watermark", gamma="watermark_gamma", delta="watermark_delta")
        )
    if flags.draft or flags.ngram is not None or flags.draft_tokens is not None:
        generation["speculation"] = Speculation(**_given(flags, tokens="draft_tokens", ngram="ngram"))
    if flags.draft:
        generation["draft"] = run.load(flags.draft).generator
    if flags.others:
        generation["others"] = tuple(run.load(other).generator for other in flags.others)
    if flags.weights:
        try:
            generation["weights"] = tuple(map(float, flags.weights.split(",")))
        except ValueError:
            raise ConfigError(f"--weights={flags.weights} are not numbers with commas between, such as 2,1") from None
    return GenerationConfig(rows=flags.rows, room=flags.room, slide=flags.slide, grammar=_grammar(flags), **generation)


def _grammar(flags: Any) -> Any:
    from gptjax.decode import constraints

    given = [name for name in ("regex", "json_schema", "choice") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} cannot be used together; leave out one of them")
    if flags.regex is not None:
        return constraints.regex(flags.regex)
    if flags.json_schema is not None:
        text = flags.json_schema
        return constraints.json_schema(text if text.lstrip().startswith("{") else _read(text))
    return constraints.choices(flags.choice) if flags.choice else None


def _read(place: str) -> str:
    if place != "-":
        return read_text(Path(place))
    stdin = getattr(sys.stdin, "buffer", None)  # bytes, whatever the locale is
    return sys.stdin.read() if stdin is None else decode(stdin.read(), "stdin")


def _prompts(flags: Any) -> list[str]:
    from gptjax.decode import prompt_files

    if flags.prompts is None:
        prompt = replace_surrogates(flags.prompt or "")
        if prompt != (flags.prompt or ""):
            console.say("prompt     is not UTF-8 and is repaired with U+FFFD")
        return [prompt]
    if flags.prompt is not None:
        raise ConfigError("--prompt and --prompts cannot be used together; leave out one of them")
    found = list(prompt_files.read(flags.prompts))
    if not found:
        raise DataError(f"--prompts={flags.prompts} has no prompts; write one a line")
    return found


def answer(flags: Any, loaded: "Run") -> None:
    """All continuations of all prompts, printed."""
    from gptjax import models
    from gptjax.core import rng
    from gptjax.decode.generate import Request

    settings, generation, prompts = _settings(flags), _how(flags), _prompts(flags)
    is_encoder_decoder = models.kind(loaded.model) == "seq2seq"
    if is_encoder_decoder and flags.prompt_logprobs:
        raise ConfigError("--prompt_logprobs is for decoders; an encoder-decoder says nothing of its source")
    if (generation.beams or generation.contrastive) and flags.samples > 1:
        raise ConfigError("--samples does nothing in a search, which draws nothing; --best gives several of its beams")
    requests = [
        Request(prompt, settings, rng.key(flags.seed, "sample", index))
        for prompt in prompts
        for index in range(flags.samples)
    ]
    facts: list[dict[str, Any]] = [{"index": number % flags.samples} for number in range(len(requests))]
    if flags.prompt_logprobs:
        of_prompts = {prompt: _of_prompt(loaded, prompt) for prompt in prompts}
        facts = [fact | of_prompts[str(request.prompt)] for fact, request in zip(facts, requests, strict=True)]
    screen = printer.Printer(requests, facts, flags.json, is_encoder_decoder)
    stride = LIVE if sys.stdout.isatty() and not flags.json else 0
    coming = loaded.answers(requests, generation, screen.on_text, stride)
    several = len(requests) > 1 and not (sys.stdout.isatty() and not flags.json)
    # The best of a search come together, and all at once. To group others would be to wait for the next.
    found: Iterable[tuple[int, Iterable[tuple[int, Sample]]]] = ((pair[0], [pair]) for pair in coming)
    if generation.beams or generation.contrastive:
        found = groupby(coming, key=itemgetter(0))
    with console.bar("texts", len(requests)) if several else nullcontext(lambda: None) as advance:
        for number, samples in found:
            screen.done(number, [sample for _, sample in samples])
            advance()
    console.say(screen.summary())


def _of_prompt(loaded: "Run", prompt: str) -> dict[str, Any]:
    """The log-probability of each token of a prompt after its first."""
    from gptjax.decode import scoring
    from gptjax.decode.prompts import prompt_ids

    ids = prompt_ids(loaded.tokenizer, prompt, loaded.generator.context)
    logprobs = scoring.scored(loaded.generator.reader, ids).logprobs.tolist() if len(ids) > 1 else []
    return {"prompt_ids": ids, "prompt_logprobs": logprobs}


def fill(flags: Any, loaded: "Run") -> None:
    """What an encoder finds behind the masks of all prompts, printed."""
    own = ("workdir", "step", "prompt", "prompts", "top_k", "json")
    unset = vars(flags_of([f"--workdir={flags.workdir}"]))
    for name, value in vars(flags).items():
        if value != unset[name] and name not in own:
            flag = "with" if name == "others" else name
            raise ConfigError(f"--{flag} is for models that write text; this one is an encoder, and fills in masks")
    for prompt in _prompts(flags):
        filled = loaded.fill(prompt, 5 if flags.top_k is None else flags.top_k)
        masks = [[one._asdict() for one in mask] for mask in filled.masks]
        print(json.dumps({"prompt": prompt, "text": filled.text, "masks": masks}) if flags.json else filled.lines())


def talk(flags: Any, loaded: "Run") -> None:
    """A dialogue with whoever writes to stdin."""
    from gptjax import models
    from gptjax.core import rng
    from gptjax.decode.generate import Request
    from gptjax.runs import chat

    if models.kind(loaded.model) != "decoder":
        raise ConfigError("--chat needs a decoder; this run is an encoder-decoder, whose --prompt is its source")
    given = [name for name in ("prompt", "prompts", "beams", "contrastive_k") if getattr(flags, name) is not None]
    if given or flags.json or flags.samples > 1 or flags.slide:
        what = given[0] if given else "json" if flags.json else "slide" if flags.slide else "samples"
        raise ConfigError(f"--{what} and --chat cannot be used together; leave out one of them")
    settings, generation = _settings(flags), _how(flags)
    template = chat.load_template(flags.workdir, flags.chat_template)
    room = loaded.generator.context - min(settings.max_tokens, loaded.generator.context // 2)
    turns = count()

    def request() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    def answer(ids: list[int], stop: tuple[str, ...]) -> str:
        wanted = settings._replace(stop=(*settings.stop, *stop))
        one = Request(tuple(ids), wanted, rng.key(flags.seed, "sample", next(turns)))
        _, sample = next(loaded.answers([one], generation, lambda _, text: printer.write(text), LIVE))
        printer.write("\n")
        return sample.text

    chat.dialogue(request, answer, template, loaded.tokenizer, room, flags.system or "")


def detect(flags: Any, loaded: "Run") -> None:
    """Whether a text has the watermark, printed."""
    from gptjax.decode.watermark import detect_text

    watermark: Any = _how(flags).watermark
    found = detect_text(_read(flags.detect), loaded.tokenizer, watermark)
    if flags.json:
        print(json.dumps(found._asdict() | {"watermarked": found.z > 4}))
        return
    verdict = "watermarked" if found.z > 4 else "no watermark found"
    counted = f"{found.green:,} of {found.tokens:,} tokens are green"
    print(f"{verdict}: {counted}, z = {found.z:.2f}, p = {found.p_value:.1e}")


def main(argv: Sequence[str]) -> None:
    """Generates as the flags say."""
    flags = flags_of(argv)
    if flags.samples < 1:
        raise ConfigError(f"samples is {flags.samples}; it must be at least 1")
    runtime.start()
    import jax

    from gptjax import models
    from gptjax.runs import run

    loaded = run.load(flags.workdir, flags.step)
    fills = models.kind(loaded.model) == "encoder"
    with cpu_idle.keep_awake(jax.default_backend() == "cpu"):
        (detect if flags.detect else fill if fills else talk if flags.chat else answer)(flags, loaded)


if __name__ == "__main__":
    arguments.run(main)
