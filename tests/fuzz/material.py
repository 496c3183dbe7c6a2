"""Valid inputs of every command, made once: runs, a set, adapters, a Hugging Face folder, a sweep, texts."""

import gzip
import json
import random
import re
import shutil

import harness
from conftest import BASE, overrides

from experiments import compare, sweep
from gptjax import convert, evaluate, generate, merge, plan, prepare, train

WORDS = ["the", "a", "model", "reads", "text", "and", "writes", "ünïcode", "again", "softly", "漢字"]
SMALL = {
    "train_steps": 4,
    "eval_every_steps": 2,
    "checkpoint_every_steps": 2,
    "sample_max_tokens": 2,
    "eval_batches": 1,
}
LORA = ["--config.finetune.method=lora", "--config.finetune.rank=2"]
# Flags that may be given besides those of the command lines.
OF_PREPARE = """--held_out --shard_tokens --text_key --prompt_key --separator --max_document --format --document_start
--blocklist --evaluation --near_threshold --min_words --clean"""
OF_TRAIN = """optimizer.name schedule.name data.mixture data.stages model.windows finetune.method log.writers mesh.data
model.activation guard.spike_z optimizer.learning_rate seed"""
OF_GENERATE = """--temperature --top_k --top_p --min_p --stop --seed --samples --regex --json_schema --choice --ensemble
--weights --ngram --step --batch_size --logit_bias --no_repeat_ngram"""
# What stands last on a command line, so that no odd value makes an example long.
CAPS = [f"--config.{key}" for key in ("train.steps=4", "eval.batches=1", "data.batch_size=4", "data.prefetch=0")]


def begin(folder):
    """Texts and odd places, which every example has."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(200)]
    text = "\n".join(lines) + "\n"
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "prompts.txt").write_text('the model\n"quoted"\n{"prompt": "ünï"}\n', encoding="utf-8")
    (folder / "values.json").write_text('{"optimizer.learning_rate": 0.01, "model.dropout": 0.1}', encoding="utf-8")
    documents(folder, lines)
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "name-\udcff.txt").write_text(text, encoding="utf-8")
    recipe = "from configs import base\n\n\ndef get_config():\n    return base.get_config()\n"
    (folder / "recipe.py").write_text(recipe, encoding="utf-8")


def whole(folder):
    """The flags of a run with a model of its own."""
    return [f"--config={BASE}", *overrides(data_path=folder / "text.txt", **SMALL)]


def cut_short(folder):
    """A run that is to go on from its first checkpoint."""
    shutil.copytree(folder / "run", folder / "half")
    for name in ("summary.json", "samples.txt", "loss.png"):
        (folder / "half" / name).unlink()
    shutil.rmtree(folder / "half" / "checkpoints" / "4")


def tuned(folder):
    """A run that was fine-tuned by LoRA."""
    lora = [f"--config.init_from={folder / 'run'}", *LORA]
    do(train, f"--config={BASE}", *lora, *few(folder), f"--workdir={folder / 'lora'}")


SET = ["--tokenizer=bytes", "--workers=1", "--held_out=0.2"]
SWEPT = ["--set", "optimizer.learning_rate=1e-3,1e-2"]
# What takes time to make, each after those that it is made of.
PIECES = {
    "run": lambda here: do(train, *whole(here), f"--workdir={here / 'run'}"),
    "other": lambda here: do(train, *whole(here), f"--workdir={here / 'other'}", "--config.seed=1"),
    "half": cut_short,
    "set": lambda here: do(prepare, "--input", here / "docs.jsonl", f"--output={here / 'set'}", *SET),
    "lora": tuned,
    "hf": lambda here: do(convert, f"--from={here / 'run'}", f"--to=hf:{here / 'hf'}"),
    "adapter": lambda here: do(convert, f"--from={here / 'lora'}", f"--to=adapter:{here / 'adapter'}"),
    "peft": lambda here: do(convert, f"--from={here / 'lora'}", f"--to=peft:{here / 'peft'}"),
    "sweep": lambda here: do(sweep, *whole(here), *SWEPT, f"--workdir={here / 'sweep'}"),
}


def few(folder):
    """The flags of a run whose model comes from another."""
    return [one for one in overrides(data_path=folder / "text.txt", **SMALL) if "config.model." not in one]


def documents(folder, lines):
    """The same documents in the forms that prepare reads."""
    records = [{"text": line, "n": number} for number, line in enumerate(lines)]
    jsonl = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    (folder / "docs.jsonl").write_text(jsonl, encoding="utf-8")
    (folder / "docs.json").write_text(json.dumps(records), encoding="utf-8")
    table = "text,n\n" + "".join(f'"{one["text"]}",{one["n"]}\n' for one in records)
    (folder / "docs.csv").write_text(table, encoding="utf-8")
    (folder / "docs.tsv").write_text(table.replace('",', '"\t').replace("text,", "text\t"), encoding="utf-8")
    (folder / "docs.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    (folder / "docs.jsonl.zst").write_bytes(zstandard.compress(jsonl.encode()))
    pq.write_table(pa.table({"text": lines}), folder / "docs.parquet")


def do(module, *arguments):
    """A command that must end well."""
    code, out, err = harness.run(module.main, list(map(str, arguments)))
    assert code == 0, (module, arguments, out, err)


PACKED = ["--config.data.path=set", "--config.data.layout=packed"]


def commands(folder):
    """By command: its module; command lines; files that they read; flags that may be given besides; what may change."""
    return commands_with_configs(folder) | commands_on_runs(folder)


def commands_with_configs(folder):
    """Commands that read text and recipes."""
    small, here = overrides(data_path=folder / "text.txt", **SMALL), str(folder)
    keys = [one.split("=")[0] for one in small]
    documents = [f"docs.{kind}" for kind in ("jsonl", "json", "csv", "tsv", "txt.gz", "jsonl.zst", "parquet")]
    prepared = ["--output=out", "--workers=1", "--json"]
    return {
        "prepare": Fuzzed(
            prepare,
            folder,
            [
                *([f"--input={name}", "--tokenizer=bytes", *prepared] for name in documents),
                ["--input=text.txt", "--tokenizer=bpe:270", "--clean=nfc,control,exact,near,length", *prepared],
                ["--input=text.txt", "--tokenizer=run", *prepared],
                ["--verify=set"],
            ],
            [*documents, "text.txt", *under(folder, "set", "run/tokenizer")],
            OF_PREPARE.split(),
        ),
        "train": Fuzzed(
            train,
            folder,
            [
                [f"--config={BASE}", *small, "--workdir=new", *CAPS],
                [f"--config={BASE}", *small, "--workdir=half"],
                [f"--config={BASE}", *small, "--workdir=run"],
                ["--config=recipe.py", *small, *PACKED, "--workdir=new", *CAPS],
                [f"--config={BASE}", *few(folder), f"--config.init_from={here}/run", "--workdir=new", *CAPS],
                [f"--config={BASE}", *few(folder), f"--config.init_from={here}/run", *LORA, "--workdir=lora"],
            ],
            ["text.txt", "recipe.py", *under(folder, "half", "run", "set", "lora")],
            [*keys, *(f"--config.{key}" for key in OF_TRAIN.split())],
            ["half", "run", "lora"],
        ),
        "plan": Fuzzed(
            plan,
            folder,
            [
                [f"--config={BASE}", *small],
                ["--config=recipe.py", *small],
                [f"--config={BASE}", "--chip=h100", "--mesh=data=8"],
            ],
            ["recipe.py"],
            [*keys, "--mesh", "--chip", "--devices", "--steps", "--config.train.dtype", "--config.model.activation"],
        ),
        "sweep": Fuzzed(
            sweep,
            folder,
            [
                [f"--config={BASE}", *small, "--set=optimizer.learning_rate=1e-3,1e-2", "--workdir=sweep", *CAPS],
                [f"--config={BASE}", *small, "--files=values.json", "--workdir=new", *CAPS],
            ],
            ["text.txt", "values.json", *under(folder, "sweep")],
            ["--set", "--random", "--files", "--evolve", "--sweep-seed", "--storage", "--study"],
            ["sweep"],
        ),
    }


def commands_on_runs(folder):
    """Commands that read what others made."""
    return {
        "generate": Fuzzed(
            generate,
            folder,
            [
                ["--workdir=run", "--prompts=prompts.txt", "--json", "--max_tokens=3"],
                ["--workdir=lora", "--prompt=the", "--max_tokens=3", "--step=4"],
                ["--workdir=run", "--prompt=the", "--beams=2", "--max_tokens=3"],
                ["--workdir=run", "--prompt=the", "--draft=other", "--max_tokens=3"],
                ["--workdir=run", "--watermark=3", "--detect=text.txt"],
            ],
            ["prompts.txt", *under(folder, "run", "lora", "other")],
            OF_GENERATE.split(),
        ),
        "evaluate": Fuzzed(
            evaluate,
            folder,
            [["--workdir=run", "--json"], ["--workdir=lora"], ["--workdir=run", "--data", "text.txt"]],
            ["text.txt", *under(folder, "run", "lora")],
            ["--step", "--data", "--test", "--predict", "--beams", "--rouge"],
        ),
        "convert": Fuzzed(
            convert,
            folder,
            [
                ["--from=run", "--to=hf:new"],
                ["--from=hf:hf", "--to=new"],
                ["--from=lora", "--to=adapter:new"],
                ["--from=lora", "--to=peft:new"],
                ["--from=adapter:adapter", "--base=run", "--to=new", "--merge"],
                ["--from=peft:peft", "--base=run", "--to=new", "--merge"],
                ["--from=lora", "--to=new", "--merge"],
            ],
            under(folder, "run", "hf", "adapter", "peft", "lora"),
            ["--tokenizer", "--dtype", "--base"],
        ),
        "merge": Fuzzed(
            merge,
            folder,
            [
                ["--runs", "run", "other", "--to=new"],
                ["--runs", "run@2", "other", "--to=new", "--method=ties", "--base=run"],
            ],
            under(folder, "run", "other"),
            ["--method", "--scale", "--density", "--base"],
        ),
        "compare": Fuzzed(
            compare,
            folder,
            [["run", "other", "--out=page", "--json"]],
            under(folder, "run", "other"),
            ["--out"],
        ),
    }


class Fuzzed:
    """A command with what is fuzzed of it; of its command lines those whose pieces are there."""

    def __init__(self, module, folder, lines, files, also, may_write=()):
        there = PIECES.keys() - {name for name in PIECES if not (folder / name).exists()}
        self.main, self.also, self.may_write = module.main, also, may_write
        self.lines = [line for line in lines if PIECES.keys() & set(re.split(r"[=:/@, ]", " ".join(line))) <= there]
        self.files = sorted(name for name in files if (folder / name).exists())


def under(folder, *names):
    """Files below folders, by their paths in the material."""
    found = [path for name in names for path in (folder / name).rglob("*")]
    return [str(path.relative_to(folder)) for path in found if path.is_file() and not path.is_symlink()]
