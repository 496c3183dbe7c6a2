"""Options of `config.data`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import is_weighted_path, limits
from gptjax.config.options import option, section
from gptjax.data.layouts import LAYOUTS
from gptjax.data.sources import SOURCES
from gptjax.data.task_formats import TASK_FORMATS


@dataclass(frozen=True)
class ExamplesOptions:
    """Records with fields at data.path: .jsonl, .json, .csv, .tsv or .parquet, or a directory of splits."""

    form: str = option(
        "",
        "text, instructions (Alpaca) or chat; for task heads: classes, values, choices, tags or spans; '': plain text",
        choices={"": None} | TASK_FORMATS,
    )
    template: str = option("{text}", "input text, with the fields of the record in braces")
    second: str = option("", "template of a second input text; spans: of the text that contains the answer")
    answer: str = option(
        "{label}", "text: template of the completion to learn; '': learn the template; spans: template of the answer"
    )
    label: str = option("label", "field of the class, value, tags or correct choice; spans: of the answer's start")
    labels: tuple[Any, ...] = option(
        (),
        "classes and tags: label names in the data, model.labels of them, in the order of the head",
        items=(str, int),
    )
    choices: str = option("choices", "field of the list of choices")
    fields: tuple[Any, ...] = option((), "column names of a .csv or .tsv file without a header", items=(str,))
    chat_template: str = option("plain", "chat: plain, chatml, llama3 or the path of a Jinja template")
    too_long: str = option(
        "cut", "examples longer than data.context: cut, leave_out or refuse; their number is reported"
    )
    balanced: bool = option(False, "weight labels equally, whatever their number of examples")
    shots: int = option(0, "number of training examples per label, or in total if there are no labels; 0: all")
    shot_seed: int = option(0, "seed of the choice of shots", most=limits.SEED)


@dataclass(frozen=True)
class AugmentOptions:
    """Fractions of training tokens that are changed, sampled anew each epoch (arXiv 1901.11196)."""

    insert: float = option(0.0, "followed by a random token of the data set", most=1)
    delete: float = option(0.0, "deleted", most=1)
    swap: float = option(0.0, "swapped with another token", most=1)
    replace: float = option(0.0, "replaced by a random token of the data set", most=1)


@dataclass(frozen=True)
class DataOptions:
    """Text and batches."""

    source: str = option("stdlib", "Python's standard library, or text, which data.path sets", choices=SOURCES)
    path: str = option("", "file, directory of .txt files, glob, http(s) address or prepared data set")
    mixture: tuple[Any, ...] = option(
        (),
        "instead of path: prepared sets and their weights, ((path, weight), ...); None: their number of tokens",
        resumes="from_here",
    )
    temperature: float = option(
        1.0, "mixture: weights are raised to 1 / temperature; above 1 they are more even", above=0, resumes="from_here"
    )
    sha256: str = option("", "expected hash of the file at an http(s) address; '': not checked")
    held_out: float = option(
        0.05, "validation fraction, by the hash of file names; with few files the end of the text", above=0, below=1
    )
    tokenizer: str = option(
        "bpe:4096", "bytes, chars, bpe:N (trained on the text) or a tiktoken name; a prepared set has its own"
    )
    layout: str = option(
        "flat",
        "flat: windows of the token stream; packed: whole documents; examples: one document a row; pairs: prompts as "
        "sources of an encoder-decoder and completions as targets",
        choices=LAYOUTS,
    )
    languages: tuple[Any, ...] = option(
        (), "parallel text at data.path: source and target, such as ('en', 'de'), as in the file names"
    )
    columns: tuple[Any, ...] = option(
        (0, 1), "parallel text in one table without a header: indices of the source and target columns"
    )
    examples: ExamplesOptions = section(ExamplesOptions)
    seed: int | None = option(
        None, "seed of the order and the random choices of batches; None: same as config.seed", most=limits.SEED
    )
    batch_size: int = option(16, "sequences per optimizer step over all devices", above=0)
    context: int | None = option(
        None, "tokens per sequence, at most model.context; None: same as model.context", above=0
    )
    augment: AugmentOptions = section(AugmentOptions)
    prefetch: int = option(2, "batches prepared ahead in threads; 0: none", most=1000, resumes="always")
    stages: tuple[Any, ...] = option(
        (), "curriculum before batch_size and context apply: ((steps, batch_size, context), ...)"
    )


def problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of `config.data`, also with the model and the number of steps."""
    data, context = config.data, config.model.context
    if data.context > context:
        yield f"data.context={data.context} is longer than the {context} positions of model.context"
    yield from stage_problems(config)
    yield from mixture_problems(data)
    yield from pair_problems(data)
    yield from example_problems(config)


def stage_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of the format and lengths of `data.stages`."""
    stages = config.data.stages
    for stage in stages:
        numbers = stage if isinstance(stage, tuple | list) else ()
        if len(numbers) != 3 or any(type(number) is not int or number < 1 for number in numbers):
            yield f"data.stages is {stages}; it must be like ((100, 16, 32),): steps, batch_size, context of each"
        elif numbers[2] > config.model.context:
            yield f"data.stages: {numbers[2]} tokens are longer than the {config.model.context} of model.context"
    stage_steps = sum(stage[0] for stage in stages)
    if stages and stage_steps >= config.train.steps:
        yield f"data.stages take {stage_steps} steps of the {config.train.steps} of train.steps"


def mixture_problems(data: ConfigDict) -> Iterator[str]:
    """Yields problems of `data.mixture` and its weights."""
    mixture = data.mixture
    weights = [one[1] for one in mixture if is_weighted_path(one)]
    numbers = [weight for weight in weights if type(weight) in (int, float)]
    if len(weights) < len(mixture) or not (len(numbers) == len(mixture) or weights == [None] * len(mixture)):
        yield f"data.mixture is {mixture}; it must be like (('sets/a', 0.7), ('sets/b', 0.3)), or all weights None"
    elif any(not weight > 0 for weight in numbers):
        yield f"data.mixture is {mixture}; weights must be more than 0 (leave out unused sets)"
    if len({one[0] for one in mixture}) < len(mixture):
        yield f"data.mixture is {mixture}; it names a set twice"
    if mixture and data.path:
        yield "data.mixture and data.path are both given; leave one out"


def pair_problems(data: ConfigDict) -> Iterator[str]:
    """Yields problems of parallel text."""
    languages, columns = data.languages, data.columns
    if languages and (len(languages) != 2 or any(not isinstance(one, str) or not one for one in languages)):
        yield f"data.languages is {languages}; it must name source and target, such as ('en', 'de'), or be ()"
    if len(columns) != 2 or any(type(one) is not int or one < 0 for one in columns) or columns[0] == columns[1]:
        yield f"data.columns is {columns}; it must be two different columns from 0, such as (0, 1)"
    if languages and data.layout != "pairs":
        yield f"data.languages={languages} is parallel text, which needs data.layout=pairs, not {data.layout}"
    if languages and data.mixture:
        yield "data.languages and data.mixture are both given; leave one out"
    if data.layout == "pairs" and any(data.augment.values()):
        yield "data.augment does nothing with data.layout=pairs; leave it out"


def example_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of records with fields."""
    data, c = config.data, config.data.examples
    if not c.form:
        return
    if data.languages or data.mixture:
        yield f"data.examples.form={c.form} and data.{'languages' if data.languages else 'mixture'} are both given"
    needs_head = c.form not in ("text", "instructions", "chat")
    layouts = ("examples",) if needs_head else ("examples", "packed", "pairs")
    if data.layout not in layouts or (c.form == "chat" and data.layout == "pairs"):
        yield f"data.examples.form={c.form} needs data.layout={layouts[0]}, not {data.layout}"
    if c.too_long not in ("cut", "leave_out", "refuse"):
        yield f"data.examples.too_long is {c.too_long!r}; it must be cut, leave_out or refuse"
    if c.form in ("classes", "tags") and len(set(c.labels)) != max(config.model.labels, 2):
        yield (
            f"data.examples.labels names {len(set(c.labels))} labels ({', '.join(c.labels) or 'none'}), and "
            f"model.labels is {config.model.labels}; give all label names in the data, and their number"
        )
    if c.form in ("tags", "spans") and any(data.augment.values()):
        yield f"data.augment moves tokens, but data.examples.form={c.form} labels each of them; leave it out"
    if c.balanced and c.form != "classes":
        yield f"data.examples.balanced is for form=classes only, not {c.form}"
