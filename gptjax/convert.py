"""Command that converts a Hugging Face model to a run, a run to a Hugging Face model, and adapters to peft and back.

python -m gptjax.convert --from=hf:gpt2 --to=runs/gpt2
"""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

EPILOG = """one of --from and --to is hf:FOLDER (for --from also hf:NAME on the Hugging Face hub), the other a run
directory. The adapter of a fine-tuned run is written to adapter:FOLDER, for LoRA and DoRA also to peft:FOLDER, or with
--merge merged into a new run. --base=RUN converts an
adapter:FOLDER or peft:FOLDER to the other format, or with --merge to a new run.

Families: openai-gpt, gpt2, gpt_neo, llama, mistral, qwen2, qwen3, bert, bart, marian, t5; safetensors only."""


def main(argv: Sequence[str]) -> None:
    """Parses the flags and converts."""
    parser = arguments.Parser(
        prog="python -m gptjax.convert",
        description="Imports and exports Hugging Face models and adapters.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--from", dest="source", metavar="FROM", required=True, help="hf:FOLDER, hf:NAME or a run directory"
    )
    parser.add_argument("--to", metavar="TO", required=True, help="new run directory, or hf:FOLDER")
    parser.add_argument("--tokenizer", default="", help="name of a gptjax tokenizer, if the folder has none")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights of its base")
    parser.add_argument("--base", default="", metavar="RUN", help="base run of an imported adapter")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights written to hf: (float32)"
    )
    flags = parser.parse_args(argv)
    if flags.merge or flags.base or {split_kind(flags.source)[0], split_kind(flags.to)[0]} & {"adapter", "peft"}:
        print_result(flags, convert_adapter(flags))
        return
    is_import, is_export = flags.source.startswith("hf:"), flags.to.startswith("hf:")
    if is_import == is_export:
        raise ConfigError("one of --from and --to must begin with hf:, and the other name a run's directory")
    if is_export and flags.tokenizer:
        raise ConfigError("--tokenizer is for --from=hf:...; a run has its own")
    if is_import and flags.dtype:
        raise ConfigError("--dtype is for --to=hf:...; a run's parameters are always float32")
    runtime.start()
    from gptjax.interop import convert_run
    from gptjax.runs import run

    if is_import:
        result = convert_run.import_run(flags.source.removeprefix("hf:"), Path(flags.to), flags.tokenizer)
    else:
        folder = Path(flags.to.removeprefix("hf:")).expanduser()
        result = convert_run.export_run(run.load(flags.source), folder, flags.dtype or "float32")
    print_result(flags, result)
    if flags.json:
        return
    if is_import and result["family"] == "bert":
        print(f"{'next':15} gptjax.load({flags.to!r}).logits(ids_BT)")
    elif is_import:
        print(f"{'next':15} python -m gptjax.generate --workdir={shlex.quote(flags.to)} --prompt='...'")
    else:
        print(f"{'next':15} transformers.{result['architecture']}.from_pretrained({flags.to[3:]!r})")


def convert_adapter(flags: Namespace) -> dict[str, Any]:
    """Exports an adapter, or merges it into a new run."""
    (source_kind, source), (target_kind, target) = (split_kind(name) for name in (flags.source, flags.to))
    kinds = (source_kind, target_kind)
    if "hf" in kinds or bool(source_kind) != bool(flags.base) or bool(target_kind) == flags.merge:
        raise ConfigError(
            "give --from=RUN --to=adapter:FOLDER, --from=RUN --to=RUN --merge, or --from=adapter:FOLDER --base=RUN "
            "--to=RUN --merge; peft: is used like adapter:"
        )
    runtime.start()
    from gptjax.interop import convert_run, peft
    from gptjax.runs import adapters, run

    formats: dict[str, Any] = {"adapter": adapters, "peft": peft}
    tuned = formats[source_kind].load(run.load(flags.base), source) if source_kind else run.load(source)
    result: dict[str, Any]
    result = convert_run.merge_run(tuned, target) if flags.merge else formats[target_kind].save(tuned, target)
    return result


def split_kind(name: str) -> tuple[str, Path]:
    """Returns ("adapter", FOLDER) for adapter:FOLDER, likewise for peft: and hf:; ("", RUN) for a run."""
    kind, _, rest = name.partition(":")
    return (kind, Path(rest).expanduser()) if kind in ("adapter", "peft", "hf") else ("", Path(name))


def print_result(flags: Namespace, result: dict[str, Any]) -> None:
    """Prints the result."""
    if flags.json:
        print(json.dumps({"from": flags.source, "to": flags.to, **result}))
        return
    for name, value in result.items():
        if value:
            print(f"{name.replace('_', ' '):15} {value if isinstance(value, str) else format(value, ',')}")


if __name__ == "__main__":
    arguments.run(main)
