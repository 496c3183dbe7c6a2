"""Prompt tuning (arXiv 2104.08691): vectors that every text of a run begins with, as ids behind its vocabulary.

The model looks those ids up in rows of its own (gptjax.finetune.attached). Everything else asks the tokenizer what
texts begin with, and the run's is seen with these ids there: so data and decoding know nothing of it.
"""

from collections.abc import Iterator
from typing import Any

from gptjax import objectives
from gptjax.config.errors import ConfigError
from gptjax.data import prepared_folders
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

# Objectives that make rows which do not begin as texts do, cut them anew, or learn from a model without the prompt.
APART = ("fim", "prefix", "next_sentence", "distillation")
ROOM = 2  # tokens beside the prompt that a row holds at least: the one a text begins with, and one of it
NOISED = 8  # the same where text is corrupted


def ids(config: Any) -> tuple[int, ...]:
    """The ids of a run's prompt, `model.vocabulary` the first of them; none where it has no prompt."""
    V = config.model.vocabulary
    return tuple(range(V, V + config.finetune.length)) if config.finetune.method == "prompt" else ()


def seen(tokenizer: Tokenizer, config: Any) -> Tokenizer:
    """The tokenizer as a run of this config reads and writes text: with its prompt before each text, if it has one.

    Where it has no id that texts begin with, its end does that as everywhere (gptjax.data.token_sets.Delimiters); but
    sources of an encoder-decoder begin with none.
    """
    prompt = ids(config)
    if not prompt:
        return tokenizer
    before = () if config.model.arch == "seq2seq" or tokenizer.end is None else (tokenizer.end,)
    return tokenizers.with_prompt(tokenizer, prompt, tokenizer.begin or before)


def problems(config: Any, kind: str) -> Iterator[str]:
    """What a run with a prompt cannot do, one line each.

    Args:
      config: of the run, resolved.
      kind: of its model.
    """
    options, data = config.finetune, config.data
    if options.method != "prompt":
        return
    fitting = ("pairs", "examples") if kind == "seq2seq" else ("packed", "examples")
    if data.layout not in fitting:
        yield (
            f"finetune.method=prompt needs rows that begin where texts do: data.layout={' or '.join(fitting)}, "
            f"not {data.layout}"
        )
    if data.layout == "pairs" and not (data.languages or data.examples.form):
        yield "finetune.method=prompt reads pairs from parallel text or examples; give data.languages"
    if any(data.augment.values()):
        yield "data.augment would draw ids of the prompt (finetune.method=prompt); leave it out"
    names = [name for name, _ in objectives.parts(config.train.objective)]
    for name in names:
        if name in APART:
            yield f"train.objective={name} has rows of its own, and finetune.method=prompt cannot begin them"
    context = min([data.context, *(stage[2] for stage in data.stages)])
    room = NOISED if "denoising" in names else ROOM
    if options.length + room > context:
        yield f"finetune.length={options.length} leaves no room in {context} tokens (data.context); give {room} more"


def check_raw(config: Any) -> None:
    """Raises ConfigError where a run with a prompt names prepared sets, whose ids have no prompt in them."""
    if config.finetune.method == "prompt" and (folders := prepared_folders(config.data)):
        raise ConfigError(f"{folders[0]} is a prepared set, without a prompt (finetune.method=prompt); give text")
