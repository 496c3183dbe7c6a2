"""Valid inputs of every command, made once: runs, a set, adapters, a Hugging Face folder, a sweep, texts."""

import gzip
import json
import random
import shutil

import harness
from conftest import BASE, overrides

from experiments import compare, sweep
from gptjax import combine, convert, evaluate, generate, plan, prepare, train

WORDS = ["the", "a", "model", "reads", "text", "and", "writes", "ünïcode", "again", "softly", "漢字"]
SMALL = {"train_steps": 4, "eval_every_steps": 2, "checkpoint_every_steps": 2, "sample_max_tokens": 2, "eval_batches": 1}
# What stands last on a command line, so that no odd value makes an example long.
CAPS = [f"--config.{key}" for key in ("train.steps=4", "eval.batches=1", "data.batch_size=4", "data.prefetch=0")]


def make(folder):
    """Fills a folder; the paths in it are of that place."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(200)]
    text = "\n".join(lines) + "\n"
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "prompts.txt").write_text('the model\n"quoted"\n{"prompt": "ünï"}\n', encoding="utf-8")
    documents(folder, lines)
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "name-\udcff.txt").write_text(text, encoding="utf-8")
    recipe = f"from configs import base\n\n\ndef get_config():\n    return base.get_config()\n"
    (folder / "recipe.py").write_text(recipe, encoding="utf-8")
    common = [f"--config={BASE}", *overrides(data_path=folder / "text.txt", **SMALL)]
    do(train, *common, f"--workdir={folder / 'run'}")
    do(train, *common, f"--workdir={folder / 'other'}", "--config.seed=1")
    shutil.copytree(folder / "run", folder / "half")
    for name in ("summary.json", "samples.txt", "loss.png"):
        (folder / "half" / name).unlink()
    shutil.rmtree(folder / "half" / "checkpoints" / "4")
    lora = [f"--config.init_from={folder / 'run'}", "--config.finetune.method=lora", "--config.finetune.rank=2"]
    do(train, f"--config={BASE}", *lora, *few(folder), f"--workdir={folder / 'lora'}")
    do(convert, f"--from={folder / 'run'}", f"--to=hf:{folder / 'hf'}")
    do(convert, f"--from={folder / 'lora'}", f"--to=adapter:{folder / 'adapter'}")
    do(convert, f"--from={folder / 'lora'}", f"--to=peft:{folder / 'peft'}")
    do(prepare, "--input", folder / "docs.jsonl", f"--output={folder / 'set'}", "--tokenizer=bytes", "--workers=1", "--held_out=0.2")
    swept = ["--set", "optimizer.learning_rate=1e-3,1e-2"]
    do(sweep, *common, *swept, f"--workdir={folder / 'sweep'}")


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


def commands(folder):
    """By command: its module; command lines; files that they read; flags that may be given besides; what may change."""
    small, here = overrides(data_path=folder / "text.txt", **SMALL), str(folder)
    keys = [one.split("=")[0] for one in small]
    documents = [f"docs.{kind}" for kind in ("jsonl", "json", "csv", "tsv", "txt.gz", "jsonl.zst", "parquet")]
    prepared = ["--output=out", "--workers=1", "--json"]
    return {
        "prepare": Fuzzed(
            prepare,
            [
                *([f"--input={name}", "--tokenizer=bytes", *prepared] for name in documents),
                ["--input=text.txt", "--tokenizer=bpe:270", "--clean=nfc,control,exact,near,length", *prepared],
                ["--input=text.txt", "--tokenizer=run", *prepared],
                ["--verify=set"],
            ],
            [*documents, "text.txt", *under(folder, "set"), *under(folder, "run/tokenizer")],
            ["--held_out", "--shard_tokens", "--text_key", "--prompt_key", "--separator", "--max_document", "--format"]
            + ["--document_start", "--blocklist", "--evaluation", "--near_threshold", "--min_words", "--clean"],
        ),
        "train": Fuzzed(
            train,
            [
                [f"--config={BASE}", *small, "--workdir=new", *CAPS],
                [f"--config={BASE}", *small, "--workdir=half"],
                [f"--config={BASE}", *small, "--workdir=run"],
                ["--config=recipe.py", *small, "--config.data.path=set", "--config.data.layout=packed", "--workdir=new", *CAPS],
                [f"--config={BASE}", *few(folder), f"--config.init_from={here}/run", "--workdir=new", *CAPS],
                [f"--config={BASE}", *few(folder), "--config.finetune.method=lora", "--config.finetune.rank=2"]
                + [f"--config.init_from={here}/run", "--workdir=lora"],
            ],
            ["text.txt", "recipe.py", *under(folder, "half"), *under(folder, "run"), *under(folder, "set"), *under(folder, "lora")],
            [*keys, "--config.optimizer.name", "--config.schedule.name", "--config.data.mixture", "--config.data.stages"]
            + ["--config.model.windows", "--config.finetune.method", "--config.log.writers", "--config.mesh.data"]
            + ["--config.model.activation", "--config.guard.spike_z", "--config.optimizer.learning_rate", "--config.seed"],
            ["half", "run", "lora"],
        ),
        "generate": Fuzzed(
            generate,
            [
                ["--workdir=run", "--prompts=prompts.txt", "--json", "--max_tokens=3"],
                ["--workdir=lora", "--prompt=the", "--max_tokens=3", "--step=4"],
                ["--workdir=run", "--prompt=the", "--beams=2", "--max_tokens=3"],
                ["--workdir=run", "--prompt=the", "--draft=other", "--max_tokens=3"],
                ["--workdir=run", "--watermark=3", "--detect=text.txt"],
            ],
            ["prompts.txt", *under(folder, "run"), *under(folder, "lora"), *under(folder, "other")],
            ["--temperature", "--top_k", "--top_p", "--min_p", "--stop", "--seed", "--samples", "--regex", "--json_schema"]
            + ["--choice", "--with", "--weights", "--ngram", "--step", "--rows", "--logit_bias", "--no_repeat_ngram"],
        ),
        "evaluate": Fuzzed(
            evaluate,
            [["--workdir=run", "--json"], ["--workdir=lora"], ["--workdir=run", "--data", "text.txt"]],
            ["text.txt", *under(folder, "run"), *under(folder, "lora")],
            ["--step", "--data", "--test", "--predict", "--beams", "--rouge"],
        ),
        "convert": Fuzzed(
            convert,
            [
                ["--from=run", "--to=hf:new"],
                ["--from=hf:hf", "--to=new"],
                ["--from=lora", "--to=adapter:new"],
                ["--from=lora", "--to=peft:new"],
                ["--from=adapter:adapter", "--base=run", "--to=new", "--merge"],
                ["--from=peft:peft", "--base=run", "--to=new", "--merge"],
                ["--from=lora", "--to=new", "--merge"],
            ],
            [*under(folder, "run"), *under(folder, "hf"), *under(folder, "adapter"), *under(folder, "peft"), *under(folder, "lora")],
            ["--tokenizer", "--dtype", "--base"],
        ),
        "plan": Fuzzed(
            plan,
            [[f"--config={BASE}", *small], ["--config=recipe.py", *small], [f"--config={BASE}", "--chip=h100", "--mesh=data=8"]],
            ["recipe.py"],
            [*keys, "--mesh", "--chip", "--devices", "--steps", "--config.train.dtype", "--config.model.activation"],
        ),
        "combine": Fuzzed(
            combine,
            [
                ["--runs", "run", "other", "--to=new"],
                ["--runs", "run@2", "other", "--to=new", "--how=ties", "--base=run"],
            ],
            [*under(folder, "run"), *under(folder, "other")],
            ["--how", "--scale", "--kept", "--base"],
        ),
        "sweep": Fuzzed(
            sweep,
            [
                [f"--config={BASE}", *small, "--set=optimizer.learning_rate=1e-3,1e-2", "--workdir=sweep", *CAPS],
                [f"--config={BASE}", *small, "--files=values.json", "--workdir=new", *CAPS],
            ],
            [*under(folder, "sweep"), "text.txt", "values.json"],
            ["--set", "--random", "--files", "--evolve", "--sweep-seed", "--storage", "--study"],
            ["sweep"],
        ),
        "compare": Fuzzed(
            compare,
            [["run", "other", "--out=page", "--json"]],
            [*under(folder, "run"), *under(folder, "other")],
            ["--out"],
        ),
    }


class Fuzzed:
    """A command with what is fuzzed of it."""

    def __init__(self, module, lines, files, also, may_write=()):
        self.main, self.lines, self.files, self.also, self.may_write = module.main, lines, sorted(files), also, may_write


def under(folder, name):
    """Files below a folder, by their paths in the material."""
    return [str(path.relative_to(folder)) for path in (folder / name).rglob("*") if path.is_file() and not path.is_symlink()]
