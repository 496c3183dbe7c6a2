"""Prompt tuning (arXiv 2104.08691): trained vectors that every text of a run begins with, as ids after the vocabulary.

The model embeds those ids by rows of their own (gptjax.finetune.attached). Data and decoding need no change: they ask
the tokenizer for the ids that texts begin with, and `with_prompt` adds the prompt's to them.
"""

from collections.abc import Iterator
from typing import Any

from gptjax import objectives
from gptjax.config.errors import ConfigError
from gptjax.data import prepared_folders
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

# Objectives whose rows do not begin as texts do, or whose teacher has no prompt.
INCOMPATIBLE = ("fim", "prefix", "next_sentence", "distillation")
MIN_TEXT = 2  # least number of tokens in a row besides the prompt: the one a text begins with, and one of the text
MIN_DENOISING_TEXT = 8  # the same for the denoising objective


def prompt_ids(config: Any) -> tuple[int, ...]:
    """Returns the ids of a run's prompt, beginning at `model.vocabulary`; empty if it has no prompt."""
    V = config.model.vocabulary
    return tuple(range(V, V + config.finetune.length)) if config.finetune.method == "prompt" else ()


def with_prompt(tokenizer: Tokenizer, config: Any) -> Tokenizer:
    """Returns the tokenizer of a run of this config, with the run's prompt, if it has one, before each text.

    If no id begins texts, the one that ends them does (gptjax.data.token_sets.Delimiters), but not for the sources of
    an encoder-decoder.
    """
    prompt = prompt_ids(config)
    if not prompt:
        return tokenizer
    begin = () if config.model.arch == "seq2seq" or tokenizer.end is None else (tokenizer.end,)
    return tokenizers.with_prompt(tokenizer, prompt, tokenizer.begin or begin)


def problems(config: Any, kind: str) -> Iterator[str]:
    """Yields a line for each setting that a run with a prompt does not support.

    Args:
      config: resolved config of the run.
      kind: kind of its model.
    """
    options, data = config.finetune, config.data
    if options.method != "prompt":
        return
    layouts = ("pairs", "examples") if kind == "seq2seq" else ("packed", "examples")
    if data.layout not in layouts:
        yield (
            f"finetune.method=prompt needs rows that begin where texts do: data.layout={' or '.join(layouts)}, "
            f"not {data.layout}"
        )
    if data.layout == "pairs" and not (data.languages or data.examples.form):
        yield "finetune.method=prompt reads pairs from parallel text or examples; give data.languages"
    if any(data.augment.values()):
        yield "data.augment could insert ids of the prompt (finetune.method=prompt); leave it out"
    names = [name for name, _ in objectives.parse_objective(config.train.objective)]
    for name in names:
        if name in INCOMPATIBLE:
            yield f"train.objective={name} builds its own rows, which finetune.method=prompt cannot begin"
    context = min([data.context, *(stage[2] for stage in data.stages)])
    needed = MIN_DENOISING_TEXT if "denoising" in names else MIN_TEXT
    if options.length + needed > context:
        yield f"finetune.length={options.length} leaves no room in {context} tokens (data.context); give {needed} more"


def check_raw(config: Any) -> None:
    """Raises ConfigError if a run with a prompt names prepared sets, whose ids do not include the prompt."""
    if config.finetune.method == "prompt" and (folders := prepared_folders(config.data)):
        raise ConfigError(f"{folders[0]} is a prepared set, without a prompt (finetune.method=prompt); give text")
