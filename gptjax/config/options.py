"""Options: the keys of a config section as a dataclass, which says everything about each key once.

A part of gptjax declares its section beside its code:

    @dataclass(frozen=True)
    class ScheduleOptions:
        name: str = option("cosine", "form of the decay", choices=SCHEDULES)
        warmup_steps: int = option(100, "steps of linear warmup from zero to the peak")

Recipes, checks, the reference page and what may change on resume are derived from these (gptjax.runs.config).
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gptjax.config import limits

# Names of the types of values, for messages.
TYPES: dict[tuple[type, ...], str] = {
    (int,): "a whole number",
    (int, types.NoneType): "a whole number or None",
    (float,): "a number",
    (float, types.NoneType): "a number or None",
    (bool,): "True or False",
    (bool, types.NoneType): "True, False or None",
    (str,): "text",
    (tuple,): "a list, such as (1, 2)",
}


class Option(NamedTuple):
    """What is known about a key before any value is given.

    Attributes:
      default: its value in a recipe that does not set it; None follows from other keys.
      meaning: one sentence, with its unit.
      choices: the values that it may have, by name; None: any.
      above, below: exclusive bounds.
      least, most: inclusive bounds; numbers are not negative unless `least` says so.
      resumes: "never", if a run that resumes must have the same value; "always"; or "from_here", if a change takes
        effect at the step where the run resumes, which its directory records.
      traced: True if the compiled step takes it as an argument, so that members of a population may differ in it.
      items: types of what a list may have; (): any.
      types: of its values.
    """

    default: Any
    meaning: str
    choices: Mapping[str, Any] | None = None
    above: float | None = None
    below: float | None = None
    least: float | None = 0
    most: float | None = None
    resumes: str = "never"
    traced: bool = False
    items: tuple[type, ...] = ()
    types: tuple[type, ...] = ()


class Section(NamedTuple):
    """A section within a section; the docstring of its dataclass is its meaning.

    Attributes:
      options: its dataclass.
      resumes: of all options in it, see `Option`; None: each has its own.
    """

    options: type
    resumes: str | None = None


def option(default: Any, meaning: str, **more: Any) -> Any:
    """Declares a key of a section; see `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(default, meaning, **more)})


def section(options: type, resumes: str | None = None) -> Any:
    """Declares a section within a section; see `Section`."""
    return dataclasses.field(default_factory=options, metadata={"section": Section(options, resumes)})


def fields(options: type) -> dict[str, Option | Section]:
    """Returns what a dataclass declares, by name."""
    hints = typing.get_type_hints(options)
    return {
        field.name: field.metadata["option"]._replace(types=_types(hints[field.name]))
        if "option" in field.metadata
        else field.metadata["section"]
        for field in dataclasses.fields(options)
    }


def _types(hint: Any) -> tuple[type, ...]:
    arguments = typing.get_args(hint)
    return arguments if isinstance(hint, types.UnionType) else (typing.get_origin(hint) or hint,)


def part_sections(options: type) -> dict[str, Section]:
    """Returns the sections of the parts that a dataclass's keys choose among, by name.

    A part has one if it has an attribute `options`, the dataclass of its own keys. Parts that are chosen elsewhere are
    in the class attribute `parts` of the dataclass.
    """
    chosen = [declared.choices or {} for declared in fields(options).values() if isinstance(declared, Option)]
    chosen.append(getattr(options, "parts", {}))
    return {
        name: Section(part.options)
        for choices in chosen
        for name, part in choices.items()
        if getattr(part, "options", None)
    }


def flat_options(options: type, prefix: str = "", resumes: str | None = None) -> dict[str, Option]:
    """Returns the options of a dataclass, and of the sections in it, by dotted name."""
    flat: dict[str, Option] = {}
    for name, declared in (fields(options) | part_sections(options)).items():
        if isinstance(declared, Option):
            flat[prefix + name] = declared._replace(resumes=resumes or declared.resumes)
        else:
            flat |= flat_options(declared.options, f"{prefix}{name}.", resumes or declared.resumes)
    return flat


def defaults(options: type) -> ConfigDict:
    """Returns a config section with the default of each key."""
    config = ConfigDict()
    for name, declared in (fields(options) | part_sections(options)).items():
        if isinstance(declared, Section):
            config[name] = defaults(declared.options)
        else:
            config[name] = placeholder(declared.types[0]) if declared.default is None else declared.default
    return config


def parse(options: type, config: Any) -> Any:
    """Returns a config section as an instance of its dataclass; values may be traced."""
    return options(
        **{
            name: parse(declared.options, config[name]) if isinstance(declared, Section) else config[name]
            for name, declared in fields(options).items()
        }
    )


def problems(schema: Mapping[str, Option], flat: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of a flat config: values of the wrong type, and numbers out of range.

    Absent keys are not a problem.
    """
    for key, value in flat.items():
        if any(name.startswith(f"{key}.") for name in schema):
            yield f"{key} is {_shown(value)}; it must hold other keys"
            continue
        parent = key.rpartition(".")[0]
        if parent in schema:
            yield f"{parent} holds other keys; it must be {TYPES[schema[parent].types]}"
        if key in schema:
            yield from _problems_of(key, schema[key], value)


def _problems_of(key: str, declared: Option, value: Any) -> Iterator[str]:
    accepted = (*declared.types, int) if float in declared.types else declared.types
    accepted = (*accepted, list) if tuple in accepted else accepted
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        yield f"{key} is {_shown(value)}; it must be {TYPES[declared.types]}"
        return
    if declared.items and not _all_are(declared.items, value):
        yield f"{key} is {_shown(value)}; it must be a list of names, such as ('good', 'bad')"
    for number in _numbers(value):
        least = None if tuple in declared.types else declared.least
        problem = limits.range_problem(number, least, declared.most)
        if problem:
            where = f"{key} is" if number is value else f"{key} has"
            yield f"{where} {limits.format_number(number)}; {problem}"


def _all_are(kinds: tuple[type, ...], value: Any) -> bool:
    """Returns True if all of a list are of these types; booleans are not numbers."""
    return all(isinstance(one, kinds) and not isinstance(one, bool) for one in value)


def bound_problems(schema: Mapping[str, Option], flat: Mapping[str, Any]) -> Iterator[str]:
    """Yields the values of a resolved flat config that lie outside the bounds of their options."""
    for key, declared in schema.items():
        value = flat[key]
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if declared.above is not None and value <= declared.above:
            whole = isinstance(value, int) and declared.above == 0
            yield f"{key} is {value}; it must be {'at least 1' if whole else f'more than {declared.above:g}'}"
        if declared.below is not None and value >= declared.below:
            yield f"{key} is {value}; it must be less than {declared.below:g}"


def _numbers(value: Any) -> Iterator[int | float]:
    """Yields the numbers in a value, also in nested lists."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
