"""python -m gptjax.convert --from=hf:gpt2 --to=runs/gpt2: a Hugging Face model becomes a run, or a run one.

Flags in, gptjax.interop.convert_run called, what was made printed.
"""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

EPILOG = """one of --from and --to is hf:FOLDER (for --from also hf:NAME on the Hugging Face hub), the other a run's
directory. What a run has tuned goes to adapter:FOLDER alone, by LoRA also to peft:FOLDER, or with --merge to a run of
its own; an adapter:FOLDER or peft:FOLDER goes with --base=RUN to the other form, or with --merge to a run.

Families: openai-gpt, gpt2, gpt_neo, llama, mistral, qwen2, qwen3, bert, bart, marian, t5; safetensors only."""


def main(argv: Sequence[str]) -> None:
    """Converts as the flags say."""
    parser = arguments.Parser(
        prog="python -m gptjax.convert", description="Hugging Face models in and out.", epilog=EPILOG
    )
    parser.add_argument("--from", dest="source", metavar="FROM", required=True, help="hf:FOLDER, hf:NAME or a run")
    parser.add_argument("--to", metavar="TO", required=True, help="a new run's directory, or hf:FOLDER")
    parser.add_argument("--tokenizer", default="", help="one of gptjax's by name, where the folder has none")
    parser.add_argument("--merge", action="store_true", help="what was added becomes part of the base's own matrices")
    parser.add_argument("--base", default="", metavar="RUN", help="of an adapter that comes in: the run it is for")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is written to hf: (float32)")
    flags = parser.parse_args(argv)
    if flags.merge or flags.base or {parted(flags.source)[0], parted(flags.to)[0]} & {"adapter", "peft"}:
        print_made(flags, tuned(flags))
        return
    inwards, outwards = flags.source.startswith("hf:"), flags.to.startswith("hf:")
    if inwards == outwards:
        raise ConfigError("one of --from and --to must begin with hf:, and the other name a run's directory")
    if outwards and flags.tokenizer:
        raise ConfigError("--tokenizer is for --from=hf:...; a run has its own")
    if inwards and flags.dtype:
        raise ConfigError("--dtype is for --to=hf:...; a run's parameters are always float32")
    runtime.start()
    from gptjax.interop import convert_run
    from gptjax.runs import run

    if inwards:
        made = convert_run.import_run(flags.source.removeprefix("hf:"), Path(flags.to), flags.tokenizer)
    else:
        folder = Path(flags.to.removeprefix("hf:")).expanduser()
        made = convert_run.export_run(run.load(flags.source), folder, flags.dtype or "float32")
    print_made(flags, made)
    if flags.json:
        return
    if inwards and made["family"] == "bert":
        print(f"{'go on with':15} gptjax.load({flags.to!r}).logits(ids_BT)")
    elif inwards:
        print(f"{'go on with':15} python -m gptjax.generate --workdir={shlex.quote(flags.to)} --prompt='...'")
    else:
        print(f"{'go on with':15} transformers.{made['architecture']}.from_pretrained({flags.to[3:]!r})")


def tuned(flags: Namespace) -> dict[str, Any]:
    """Writes what was fine-tuned: an adapter, or a run of its own in which it is part of the base."""
    (into, source), (out, target) = (parted(name) for name in (flags.source, flags.to))
    if "hf" in (into, out) or bool(into) != bool(flags.base) or bool(out) == flags.merge:
        raise ConfigError(
            "give --from=RUN --to=adapter:FOLDER, --from=RUN --to=RUN --merge, or --from=adapter:FOLDER --base=RUN "
            "--to=RUN --merge; peft: goes like adapter:"
        )
    runtime.start()
    from gptjax.interop import convert_run, peft
    from gptjax.runs import adapters, run

    forms: dict[str, Any] = {"adapter": adapters, "peft": peft}
    one = forms[into].load(run.load(flags.base), source) if into else run.load(source)
    made: dict[str, Any] = convert_run.merge_run(one, target) if flags.merge else forms[out].save(one, target)
    return made


def parted(name: str) -> tuple[str, Path]:
    """("adapter", FOLDER) of adapter:FOLDER, and so of peft: and hf:; ("", RUN) of a run."""
    kind, _, rest = name.partition(":")
    return (kind, Path(rest).expanduser()) if kind in ("adapter", "peft", "hf") else ("", Path(name))


def print_made(flags: Namespace, made: dict[str, Any]) -> None:
    """Tells what was made."""
    if flags.json:
        print(json.dumps({"from": flags.source, "to": flags.to, **made}))
        return
    for name, value in made.items():
        if value:
            print(f"{name.replace('_', ' '):15} {value if isinstance(value, str) else format(value, ',')}")


if __name__ == "__main__":
    arguments.run(main)
