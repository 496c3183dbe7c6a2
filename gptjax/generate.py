"""python -m gptjax.generate --workdir=runs/base --prompt='def read(': prints text as it is generated.

Reads one prompt, a file of prompts (--prompts, a batch), or a dialogue (--chat). For an encoder-decoder a prompt is the
source, and only the targets are printed, a line each; an encoder fills in the prompt's masks. Parses flags, calls
Run.generate_batch or Run.fill, and prints text or JSON objects.
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

MAX_SAMPLES = 1_000_000  # of a prompt; all are in memory at once
STREAM_STRIDE = 8  # tokens between two outputs of a text that streams to a terminal


def flags_of(argv: Sequence[str]) -> Any:
    """Parses the flags."""
    parser = arguments.Parser(prog="python -m gptjax.generate", description="Continues a prompt with a trained model.")
    add, given = parser.add_argument, parser.add_argument_group
    add("--workdir", type=Path, required=True, help="a run's directory")
    arguments.add_step(parser)
    add(
        "--prompt", help="text to continue (default: the start of a document), to translate, or with [MASK]s to fill in"
    )
    add("--prompts", help="a file of prompts: one per line, plain or JSON, or records with a prompt; - for stdin")
    add(
        "--chat",
        action="store_true",
        help="a dialogue: reads lines from stdin and answers; /reset starts anew, /exit ends",
    )
    add("--chat_template", type=Path, help="a file with a chat template, for a run that has none")
    add("--system", help="system message of a dialogue")
    add("--samples", type=arguments.number(most=MAX_SAMPLES), default=1, help="continuations of each prompt (1)")
    add(
        "--seed",
        type=arguments.number(least=0, most=limits.SEED),
        default=0,
        help="the same seed gives the same text (%(default)s)",
    )
    add("--batch_size", type=arguments.number(), default=0, help="texts generated at once; 0: all, at most 16")
    add("--max_length", type=arguments.number(), default=0, help="tokens to allocate for a text; 0: as needed")
    add("--cache_dtype", choices=["float32", "bfloat16"], help="of keys and values; default: that of the arithmetic")
    add("--sliding_context", action="store_true", help="attend to the newest tokens of texts beyond the context")
    add(
        "--logprobs",
        type=arguments.number(),
        metavar="N",
        help="with --json: the N most likely tokens at each position",
    )
    add("--prompt_logprobs", action="store_true", help="with --json: log-probabilities of the prompt's tokens")
    _add_sampling(given)
    _add_models(given)
    _add_searches(given)
    flags = parser.parse_args(argv)
    _depends(flags, "chat", "chat_template", "system")
    _depends(flags, "json", "logprobs", "prompt_logprobs")
    return flags


def _add_sampling(given: Any) -> None:
    sampling = given("sampling", "filters are applied in this order, each to the result of the previous")
    add = sampling.add_argument
    add("--max_tokens", type=arguments.number(), help="maximum number of new tokens (200)")
    add("--temperature", type=arguments.number(float), help="divides the logits; 0: greedy (0.8)")
    add("--top_k", type=arguments.number(), help="sample from the k most likely; 0: off (50); tokens for a mask (5)")
    add("--top_p", type=arguments.number(float), help="sample from the most likely that reach this sum; 1: off (1)")
    add("--min_p", type=arguments.number(float), help="least probability, relative to the highest; 0: off (0)")
    add("--typical_p", type=arguments.number(float), help="as top_p, of those closest to the entropy; 1: off (1)")
    add("--repetition_penalty", type=arguments.number(float), help="for tokens of prompt and text; 1: off (1)")
    add("--frequency_penalty", type=arguments.number(float), help="nats for each occurrence of a token in the text (0)")
    add("--presence_penalty", type=arguments.number(float), help="nats for each token that occurs in the text (0)")
    add("--no_repeat_ngram", type=arguments.number(), help="no n-gram of this size occurs twice; 0: off (0)")
    add("--logit_bias", action="append", metavar="ID=NATS", help="added to a token's logit; may be repeated")
    add("--min_tokens", type=arguments.number(), help="minimum number of new tokens (0)")
    add("--stop", action="append", help="string that ends the text; may be repeated")

    constrain = given("constraints (pip install 'gptjax[constraints]')").add_argument
    constrain("--regex", help="the whole text matches")
    constrain("--json_schema", help="JSON that the schema accepts; a file or the schema itself")
    constrain("--choice", action="append", help="one of these texts; repeated")


def _add_models(given: Any) -> None:
    add = given("ensembles and guidance").add_argument
    add("--ensemble", action="append", type=Path, help="a further run of an ensemble; may be repeated")
    add(
        "--combine", help="probabilities (default), logits, or token: probabilities, weighted by each model's certainty"
    )
    add("--weights", help="of each model, that of --workdir first, as in 2,1")
    add("--guidance", type=arguments.number(float), help="scale of classifier-free guidance; 1: off (1)")
    add("--negative_prompt", help="prompt to guide away from (default: none)")

    speculate = given("speculative decoding").add_argument
    speculate("--draft", type=Path, help="a smaller run with the same tokenizer, the draft model")
    speculate("--ngram", type=arguments.number(), help="or prompt lookup: the longest n-gram that is looked up")
    speculate("--draft_tokens", type=arguments.number(), help="number of tokens drafted at a time (4)")


def _add_searches(given: Any) -> None:
    search = given("search instead of sampling").add_argument
    search("--beams", type=arguments.number(), help="number of beams of beam search")
    search("--groups", type=arguments.number(), help="groups of beams, which avoid each other's tokens (1)")
    search("--diversity_penalty", type=arguments.number(float), help="strength of that (0)")
    search("--length_penalty", type=arguments.number(float), help="above 0 favors longer texts (1)")
    search("--early_stopping", choices=["true", "false", "never"], help="when a search ends (false)")
    search("--best", type=arguments.number(), help="number of texts returned for each prompt (1)")
    search("--contrastive_k", type=arguments.number(), help="number of candidates of contrastive search")
    search("--contrastive_alpha", type=arguments.number(float), help="weight of the degeneration penalty (0.6)")

    mark = given("watermark").add_argument
    mark(
        "--watermark",
        type=arguments.number(least=0, most=2**64 - 1),
        metavar="KEY",
        help="watermarks the text with this key",
    )
    mark("--watermark_gamma", type=arguments.number(float), help="fraction of green tokens (0.25)")
    mark("--watermark_delta", type=arguments.number(float), help="nats added to their logits (2)")
    mark("--detect", metavar="FILE", help="tests this text for the watermark; - for stdin")


def _given(flags: Any, **names: str) -> dict[str, Any]:
    """Returns the values of the flags that were given, by field names."""
    return {name: getattr(flags, flag) for name, flag in names.items() if getattr(flags, flag) is not None}


def _sampling_params(flags: Any) -> "SamplingParams":
    from gptjax.decode.settings import SamplingParams

    given = _given(flags, **{name: name for name in SamplingParams._fields})
    given["stop"] = tuple(given.get("stop", ()))
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    if given.get("temperature") == 0 and flags.top_k:
        raise ConfigError(f"top_k={flags.top_k} does nothing at temperature 0, which is greedy; leave it out")
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
    """Raises ConfigError where one of these flags is given without the flag that it depends on."""

    def is_given(name: str) -> bool:
        value = getattr(flags, name)
        return value is not None and value is not False

    for name in names:
        if is_given(name) and not is_given(on):
            raise ConfigError(f"--{name} does nothing without --{on}")


def _generation_config(flags: Any) -> "GenerationConfig":
    from gptjax.decode.beam import BeamSearchParams
    from gptjax.decode.contrastive import ContrastiveSearchParams
    from gptjax.decode.drafting import SpeculativeConfig
    from gptjax.decode.generate import GenerationConfig
    from gptjax.decode.watermark import Watermark
    from gptjax.runs import run

    _depends(flags, "beams", "groups", "diversity_penalty", "length_penalty", "early_stopping", "best")
    _depends(flags, "contrastive_k", "contrastive_alpha")
    _depends(flags, "watermark", "watermark_gamma", "watermark_delta", "detect")
    _depends(flags, "ensemble", "combine", "weights")
    generation: dict[str, Any] = _given(
        flags, guidance="guidance", negative="negative_prompt", alternatives="logprobs", cache_dtype="cache_dtype"
    )
    generation |= _given(flags, combine="combine")
    if flags.beams is not None:
        names = ("beams", "groups", "diversity_penalty", "length_penalty", "best")
        stopping: Any = {"true": True, "false": False, "never": "never", None: False}[flags.early_stopping]
        generation["beams"] = BeamSearchParams(
            **_given(flags, **{name: name for name in names}), early_stopping=stopping
        )
    if flags.contrastive_k is not None:
        generation["contrastive"] = ContrastiveSearchParams(
            **_given(flags, k="contrastive_k", alpha="contrastive_alpha")
        )
    if flags.watermark is not None:
        generation["watermark"] = Watermark(
            **_given(flags, key="watermark", gamma="watermark_gamma", delta="watermark_delta")
        )
    if flags.draft or flags.ngram is not None or flags.draft_tokens is not None:
        generation["speculation"] = SpeculativeConfig(**_given(flags, tokens="draft_tokens", ngram="ngram"))
    if flags.draft:
        generation["draft"] = run.load(flags.draft).generator
    if flags.ensemble:
        generation["ensemble"] = tuple(run.load(other).generator for other in flags.ensemble)
    if flags.weights:
        try:
            generation["weights"] = tuple(map(float, flags.weights.split(",")))
        except ValueError:
            raise ConfigError(f"--weights={flags.weights} are not numbers with commas between, such as 2,1") from None
    return GenerationConfig(
        batch_size=flags.batch_size,
        max_length=flags.max_length,
        sliding_context=flags.sliding_context,
        grammar=_grammar(flags),
        **generation,
    )


def _grammar(flags: Any) -> Any:
    from gptjax.decode import constraints

    given = [name for name in ("regex", "json_schema", "choice") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} cannot be used together; leave out one of them")
    if flags.regex is not None:
        return constraints.regex(flags.regex)
    if flags.json_schema is not None:
        text = flags.json_schema
        return constraints.json_schema(text if text.lstrip().startswith("{") else _read_text(text))
    return constraints.choices(flags.choice) if flags.choice else None


def _read_text(place: str) -> str:
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
    prompts = list(prompt_files.read(flags.prompts))
    if not prompts:
        raise DataError(f"--prompts={flags.prompts} has no prompts; write one per line")
    return prompts


def generate_texts(flags: Any, loaded: "Run") -> None:
    """Generates and prints all continuations of all prompts."""
    from gptjax import models
    from gptjax.core import rng
    from gptjax.decode.generate import Request

    params, generation, prompts = _sampling_params(flags), _generation_config(flags), _prompts(flags)
    is_encoder_decoder = models.kind(loaded.model) == "seq2seq"
    if is_encoder_decoder and flags.prompt_logprobs:
        raise ConfigError("--prompt_logprobs is for decoders; an encoder-decoder does not score its source")
    if (generation.beams or generation.contrastive) and flags.samples > 1:
        raise ConfigError(
            "--samples does nothing in a search, which does not sample; --best returns several of its beams"
        )
    requests = [
        Request(prompt, params, rng.key(flags.seed, "sample", index))
        for prompt in prompts
        for index in range(flags.samples)
    ]
    facts: list[dict[str, Any]] = [{"index": number % flags.samples} for number in range(len(requests))]
    if flags.prompt_logprobs:
        scores = {prompt: _prompt_logprobs(loaded, prompt) for prompt in prompts}
        facts = [fact | scores[str(request.prompt)] for fact, request in zip(facts, requests, strict=True)]
    screen = printer.Printer(requests, facts, flags.json, is_encoder_decoder)
    stride = STREAM_STRIDE if sys.stdout.isatty() and not flags.json else 0
    outputs = loaded.generate_batch(requests, generation, screen.on_text, stride)
    several = len(requests) > 1 and not (sys.stdout.isatty() and not flags.json)
    # The best of a search arrive together. Grouping other texts would wait for the next one.
    results: Iterable[tuple[int, Iterable[tuple[int, Sample]]]] = ((pair[0], [pair]) for pair in outputs)
    if generation.beams or generation.contrastive:
        results = groupby(outputs, key=itemgetter(0))
    with console.bar("texts", len(requests)) if several else nullcontext(lambda: None) as advance:
        for number, samples in results:
            screen.done(number, [sample for _, sample in samples])
            advance()
    console.say(screen.summary())


def _prompt_logprobs(loaded: "Run", prompt: str) -> dict[str, Any]:
    """Returns the log-probability of each token of a prompt after its first."""
    from gptjax.decode import scoring
    from gptjax.decode.prompts import prompt_ids

    ids = prompt_ids(loaded.tokenizer, prompt, loaded.generator.context)
    logprobs = scoring.score_text(loaded.generator.decoder, ids).logprobs.tolist() if len(ids) > 1 else []
    return {"prompt_ids": ids, "prompt_logprobs": logprobs}


def fill(flags: Any, loaded: "Run") -> None:
    """Prints the most likely tokens of the masks of all prompts."""
    allowed = ("workdir", "step", "prompt", "prompts", "top_k", "json")
    unset = vars(flags_of([f"--workdir={flags.workdir}"]))
    for name, value in vars(flags).items():
        if value != unset[name] and name not in allowed:
            raise ConfigError(f"--{name} is for models that write text; this one is an encoder, and fills in masks")
    for prompt in _prompts(flags):
        filled = loaded.fill(prompt, 5 if flags.top_k is None else flags.top_k)
        masks = [[one._asdict() for one in mask] for mask in filled.masks]
        print(json.dumps({"prompt": prompt, "text": filled.text, "masks": masks}) if flags.json else filled.lines())


def run_chat(flags: Any, loaded: "Run") -> None:
    """Runs a dialogue with lines from stdin."""
    from gptjax import models
    from gptjax.core import rng
    from gptjax.decode.generate import Request
    from gptjax.runs import chat

    if models.kind(loaded.model) != "decoder":
        raise ConfigError("--chat needs a decoder; this run is an encoder-decoder, whose --prompt is its source")
    given = [name for name in ("prompt", "prompts", "beams", "contrastive_k") if getattr(flags, name) is not None]
    if given or flags.json or flags.samples > 1 or flags.sliding_context:
        what = (
            given[0] if given else "json" if flags.json else "sliding_context" if flags.sliding_context else "samples"
        )
        raise ConfigError(f"--{what} and --chat cannot be used together; leave out one of them")
    params, generation = _sampling_params(flags), _generation_config(flags)
    template = chat.load_template(flags.workdir, flags.chat_template)
    max_length = loaded.generator.context - min(params.max_tokens, loaded.generator.context // 2)
    turns = count()

    def read_line() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    def answer(ids: list[int], stop: tuple[str, ...]) -> str:
        turn_params = params._replace(stop=(*params.stop, *stop))
        one = Request(tuple(ids), turn_params, rng.key(flags.seed, "sample", next(turns)))
        _, sample = next(loaded.generate_batch([one], generation, lambda _, text: printer.write(text), STREAM_STRIDE))
        printer.write("\n")
        return sample.text

    chat.dialogue(read_line, answer, template, loaded.tokenizer, max_length, flags.system or "")


def detect(flags: Any, loaded: "Run") -> None:
    """Tests a text for the watermark and prints the result."""
    from gptjax.decode.watermark import detect_text

    watermark: Any = _generation_config(flags).watermark
    detection = detect_text(_read_text(flags.detect), loaded.tokenizer, watermark)
    if flags.json:
        print(json.dumps(detection._asdict() | {"watermarked": detection.z > 4}))
        return
    verdict = "watermarked" if detection.z > 4 else "no watermark found"
    counts = f"{detection.green:,} of {detection.tokens:,} tokens are green"
    print(f"{verdict}: {counts}, z = {detection.z:.2f}, p = {detection.p_value:.1e}")


def main(argv: Sequence[str]) -> None:
    """Generates text as the flags specify."""
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
        (detect if flags.detect else fill if fills else run_chat if flags.chat else generate_texts)(flags, loaded)


if __name__ == "__main__":
    arguments.run(main)
