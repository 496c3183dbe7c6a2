"""python -m gptjax.convert --from=hf:gpt2 --to=runs/gpt2: a Hugging Face model becomes a run, or a run one.

Flags in, gptjax.interop.transfer called, what was made printed.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from gptjax import command, runtime
from gptjax.config import ConfigError

EPILOG = """one of --from and --to is hf:FOLDER (for --from also hf:NAME on the Hugging Face hub), the other a run's
directory. Families: openai-gpt, gpt2, gpt_neo, llama, mistral, qwen2, qwen3, bert, bart, marian, t5;
safetensors only."""


def main(argv: Sequence[str]) -> None:
    """Converts as the flags say."""
    parser = command.Parser(
        prog="python -m gptjax.convert", description="Hugging Face models in and out.", epilog=EPILOG
    )
    parser.add_argument("--from", dest="source", metavar="FROM", required=True, help="hf:FOLDER, hf:NAME or a run")
    parser.add_argument("--to", metavar="TO", required=True, help="a new run's directory, or hf:FOLDER")
    parser.add_argument("--tokenizer", default="", help="one of gptjax's by name, where the folder has none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is written to hf: (float32)")
    flags = parser.parse_args(argv)
    inwards, outwards = flags.source.startswith("hf:"), flags.to.startswith("hf:")
    if inwards == outwards:
        raise ConfigError("one of --from and --to must begin with hf:, and the other name a run's directory")
    if outwards and flags.tokenizer:
        raise ConfigError("--tokenizer is for --from=hf:...; a run has its own")
    if inwards and flags.dtype:
        raise ConfigError("--dtype is for --to=hf:...; a run's parameters are always float32")
    runtime.start()
    from gptjax import run
    from gptjax.interop import transfer

    if inwards:
        made = transfer.import_run(flags.source.removeprefix("hf:"), Path(flags.to), flags.tokenizer)
    else:
        folder = Path(flags.to.removeprefix("hf:")).expanduser()
        made = transfer.export_run(run.load(flags.source), folder, flags.dtype or "float32")
    if flags.json:
        print(json.dumps({"from": flags.source, "to": flags.to, **made}))
        return
    for name, value in made.items():
        if value:
            print(f"{name.replace('_', ' '):15} {value if isinstance(value, str) else format(value, ',')}")
    if inwards and made["family"] == "bert":
        print(f"{'go on with':15} gptjax.load({flags.to!r}).logits(ids_BT)")
    elif inwards:
        print(f"{'go on with':15} python -m gptjax.generate --workdir={flags.to} --prompt='...'")
    else:
        print(f"{'go on with':15} transformers.{made['architecture']}.from_pretrained({flags.to[3:]!r})")


if __name__ == "__main__":
    command.run(main)
