"""Switches of a run that are tried together, and a process that tries them: a config a line in, what came of it out.

In a process of its own because the number of devices is chosen once: two, virtual ones, so that meshes are a switch.
Each run takes four steps, and once more its last two from the checkpoint that the first two left, as a process does
that was killed; both write text.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import operator
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "2"
sys.path.insert(0, "tests")

import jax
import numpy as np
from conftest import BASE, overrides  # before jax: it says how much to optimise

import gptjax
from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.finetune import methods
from gptjax.runs import config as configs
from gptjax.runs import pretrained
from gptjax.training import loop, setup

WORDS = ["the", "a", "model", "reads", "text", "and", "writes", "ünïcode", "again", "softly"]
TEXT, PAIRS = "text.txt", "pairs.tsv"

COMMON = {
    "model.width": 8, "model.context": 16, "data.held_out": 0.05, "data.path": TEXT,
    "train.steps": 4, "schedule.warmup_steps": 1, "checkpoint.every_steps": 2, "eval.every_steps": 4,
    "eval.batches": 1, "log.every_steps": 1, "sample.prompt": "a", "sample.max_tokens": 3, "mesh.data": 1,
}  # fmt: skip
LSTMS = {"model.arch": "seq2seq", "model.encoder": "lstm", "model.decoder": "lstm", "train.objective": "seq2seq"}
PATHS = ("data.path", "objective.teacher")  # of keys, within the folder
TEACHER = "base-gpt"


def answers(task, form, **more):
    """Keys of runs that learn a task's answers from examples of a form."""
    keys = {"model.task": task, "train.objective": task, "data.layout": "examples", "data.path": f"{form}.jsonl"}
    return keys | {"data.examples.form": form} | {f"data.examples.{name}": value for name, value in more.items()}


CLASSIFIES = answers("classification", "classes", labels=("no", "yes"))


def of(key, *values):
    """A switch of one key."""
    return {str(value): {key: value} for value in values}


# Switches of runs that begin anew: by name the values of each, and the keys that a value sets. The first one is what
# the model is; what it needs (a layout, a head) the others may not take away.
SWITCHES = {
    "kind": {
        "causal": {},
        "prefix": {"train.objective": "prefix"},
        "fim": {"train.objective": "fim"},
        "multi_token": {"train.objective": "multi_token", "model.mtp_depth": 1},
        "distillation": {"train.objective": "distillation", "objective.teacher": TEACHER},
        "contrastive": {
            "model.task": "embedding", "model.pooling": "mean", "train.objective": "contrastive",
            "data.layout": "examples", "model.dropout": 0.1,
        },
        "classification": CLASSIFIES,
        "regression": answers("regression", "values"),
        "choice": answers("choice", "choices"),
        "tagging": {"model.arch": "encoder"} | answers("tagging", "tags", labels=("O", "C")),
        "span": answers("span", "spans", template="?", second="{text}", answer="{said}"),
        "masked": {"model.arch": "encoder", "train.objective": "masked", "sample.prompt": "a [MASK] text"},
        "denoising": {"model.arch": "seq2seq", "train.objective": "denoising"},
        "translation": LSTMS | {"data.layout": "pairs", "data.path": PAIRS, "data.languages": ("en", "de")},
        "recurrent": {"model.arch": "recurrent"},
    },
    "mesh": {
        "one": {}, "data": {"mesh.data": 2}, "fsdp": {"mesh.fsdp": 2}, "tensor": {"mesh.tensor": 2},
        "context": {"mesh.context": 2}, "expert": {"mesh.expert": 2, "model.mlp": "experts", "model.experts": 2},
    },
    "layers": of("model.layers", 1, 2),
    "mlp": {"dense": {}, "experts": {"model.mlp": "experts", "model.experts": 2}},
    "layout": {"own": {}, **of("data.layout", "packed", "examples")},
    "optimizer": of("optimizer.name", "adamw", "muon", "lion", "adafactor", "sophia", "schedule_free"),
    "dtype": of("train.dtype", "float32", "bfloat16"),
    "positions": of(
        "model.positions", "learned", "sinusoidal", "sinusoidal_halves", "rotary", "alibi", "relative", "none"
    ),
    "activation": of("model.activation", "gelu_tanh", "gelu", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"),
    "norm": of("model.norm", "layernorm", "rmsnorm"),
    "norm_position": of("model.norm_position", "pre", "post"),
    "windows": of("model.windows", (0,), (4, 0), (3,)),
    "kv_heads": of("model.kv_heads", 2, 1),
    "qk_norm": of("model.qk_norm", "none", "head"),
    "value_residual": of("model.value_residual", False, True),
    "scan_layers": of("model.scan_layers", False, True),
    "remat": of("model.remat", "none", "dots", "full"),
    "kernels": of("model.kernels", "auto", "plain"),
    "biases": {"none": {}, "all": {"model.use_bias": True}, "qkv": {"model.qkv_bias": True}},
    "head": {"tied": {}, "untied": {"model.tied_head": False}, "biased": {"model.head_bias": True}},
    "logit_softcap": of("model.logit_softcap", 0.0, 5.0),
    "embedding": {"plain": {}, "normed": {"model.embedding_norm": True, "model.embedding_scale": 3.0}},
    "residual_init": of("model.residual_init", "scaled", "plain", "zero"),
    "parametrization": {
        "standard": {},
        "mup": {"model.parametrization": "mup", "model.base_width": 4, "model.base_head_width": 2},
    },
    "vocabulary": {"tokenizer's": {}, "larger": {"model.vocabulary": 320}},
    "dropout": of("model.dropout", 0.0, 0.1),
    "cell": of("model.cell", "lstm", "gru", "rnn"),
    "coder": {"both": {}, "encoder": {"model.decoder": "transformer"}, "decoder": {"model.encoder": "transformer"}},
    "attention": of("model.attention", "additive", "multiplicative"),
    "bidirectional": of("model.bidirectional", True, False),
    "rotary_scaling": of("model.rotary.scaling", "none", "linear", "llama3"),
    "accumulation": of("train.grad_accumulation", 1, 2),
    "schedule": of("schedule.name", "cosine", "linear", "wsd", "inverse_sqrt", "constant"),
    "ema": of("optimizer.ema", 0.0, 0.5),
    "clip_norm": of("optimizer.clip_norm", 1.0, 0.0),
    "guard": {"finite": {}, "spikes": {"guard.spike_z": 3.0, "guard.warmup_steps": 2}},
    "smoothing": {"none": {}, "both": {"objective.label_smoothing": 0.1, "objective.z_loss": 1e-3}},
    "adversarial": of("objective.adversarial", "none", "fgm", "pgd"),
    "masking": of("objective.masking", "token", "word", "span"),
    "corruption": of("objective.corruption", "spans", "infilling"),
    "augment": {"none": {}, "all": {f"data.augment.{way}": 0.1 for way in ("insert", "delete", "swap", "replace")}},
    "stages": of("data.stages", (), ((1, 8, 8),)),
    "statistics": of("log.statistics", 0, 2),
    "keep_best": of("checkpoint.keep_best", 0, 1),
    "prefetch": of("data.prefetch", 2, 0),
}  # fmt: skip

# The same of runs that begin with another's parameters, which has one of these models.
BASES = {
    "gpt": {"model.use_bias": True, "model.positions": "rotary", "model.activation": "swiglu"},
    "encoder": {"model.arch": "encoder", "train.objective": "masked", "model.use_bias": True},
    "recurrent": {"model.arch": "recurrent", "model.use_bias": True},
}
TUNING = {
    "base": {
        "gpt": {},
        "encoder": {"train.objective": "masked", "sample.prompt": "a [MASK] text"},
        "recurrent": {},
    },
    "method": {
        "rule": {"finetune.method": "rule", "finetune.rule": "kernel"},
        "top": {"finetune.method": "top", "finetune.top_layers": 1},
        **of("finetune.method", "full", "bitfit", "lora", "dora", "adalora", "ia3", "adapter", "prefix"),
    },
    "quantise": of("finetune.quantise", "none", "int8", "nf4"),
    "head": {"none": {}, "classification": CLASSIFIES},
    "layout": {"own": {}, "packed": {"data.layout": "packed"}},
    "optimizer": of("optimizer.name", "adamw", "sophia", "muon"),
    "dtype": of("train.dtype", "float32", "bfloat16"),
    "mesh": {"one": {}, "fsdp": {"mesh.fsdp": 2}, "tensor": {"mesh.tensor": 2}},
    "scan_layers": of("model.scan_layers", False, True),
    "remat": of("model.remat", "none", "full"),
    "dropout": {"none": {}, "both": {"model.dropout": 0.1, "finetune.dropout": 0.1}},
    "also": of("finetune.also", "", "norm"),
    "options": {
        "plain": {},
        "others": {"finetune.rank_stabilised": True, "finetune.b_rate": 4.0, "finetune.parallel": True},
    },
    "rates": {"equal": {}, "decay": {"finetune.layer_decay": 0.9}, "rules": {"finetune.rates": (("tokens", 0.5),)}},
    "unfreeze": of("finetune.unfreeze_every", 0, 2),
    "remember": {"nothing": {}, "start": {"finetune.l2_to_start": 0.1}, "fisher": {"finetune.ewc": 0.1}},
    "accumulation": of("train.grad_accumulation", 1, 2),
    "ema": of("optimizer.ema", 0.0, 0.5),
    "guard": {"finite": {}, "spikes": {"guard.spike_z": 3.0, "guard.warmup_steps": 2}},
}
ARRAYS = {"switches": SWITCHES, "tuning": TUNING}
FINETUNE = {
    "finetune.method": "lora",
    "finetune.rank": 2,
    "finetune.length": 3,
    "finetune.bottleneck": 2,
    "finetune.fisher_rows": 4,
}
FINETUNE |= {"finetune.adalora.first_rank": 3, "finetune.adalora.warmup_steps": 1, "finetune.adalora.final_steps": 1}


def keys_of(array, chosen):
    """All keys that a run of this choice, `{switch: value}`, sets; a switch that is left out stays as it is."""
    keys = COMMON | (FINETUNE if array == "tuning" else {})
    for name, values in ARRAYS[array].items():
        keys |= values[chosen[name]] if name in chosen else {}
    for side in ("encoder", "decoder"):
        if keys.get(f"model.{side}") == "lstm":
            keys[f"model.{side}"] = keys.get("model.cell", "lstm")
    return keys


def pairs_of(chosen):
    """Every two (switch, value) of a choice, in one order."""
    return set(itertools.combinations(sorted(chosen.items()), 2))


def every_pair(array):
    """Of all choices."""
    values = [[(name, value) for value in own] for name, own in ARRAYS[array].items()]
    return [tuple(sorted(pair)) for a, b in itertools.combinations(values, 2) for pair in itertools.product(a, b)]


@functools.cache
def base_recipe():
    return configs.read(BASE, overrides())


def config_of(keys, folder=Path()):
    """The config, unresolved, of texts in that folder."""
    config = base_recipe().copy_and_resolve_references()
    with config.unlocked():
        for key, value in (keys | {key: str(folder / keys[key]) for key in PATHS if key in keys}).items():
            *sections, name = key.split(".")
            functools.reduce(operator.getitem, sections, config)[name] = value
    return config.lock()


def base_of(name, folder):
    """The run that others of an array begin with, made where there is none."""
    workdir = folder / f"base-{name}"
    if not (workdir / "summary.json").exists():
        loop.train(config_of(COMMON | BASES[name] | {"train.steps": 1, "checkpoint.every_steps": 1}, folder), workdir)
    return workdir


def config_in(folder, array, chosen):
    """The config of a choice, unresolved, and the run that it begins with."""
    keys = keys_of(array, chosen)
    if array != "tuning":
        if "objective.teacher" in keys:
            base_of("gpt", folder)
        return config_of(keys, folder), None
    origin = base_of(chosen.get("base", "gpt"), folder)
    return config_of(keys | {"init_from": str(origin)}, folder), origin


@functools.cache
def check_parts(origin, config):
    """Raises ConfigError where a run of a config, as JSON, cannot tune a part of that run's parameters."""
    config = configs.from_json(config)
    pretrained.partition_shapes(Path(origin), config, models.shapes(methods.build_model(config)))


def refusal(folder, array, chosen):
    """The line that refuses a choice before anything is read; "" where nothing does."""
    config, origin = config_in(folder, array, chosen)
    try:
        config = setup.resolve(config, folder / "none", origin)
        if config.objective.teacher and config.model.vocabulary:
            return "the teacher has no vocabulary but its tokenizer's"
        if origin and pretrained.is_partial(config):
            check_parts(str(origin), configs.to_json(configs.with_vocabulary(config, config.model.vocabulary or 257)))
    except ConfigError as error:
        return str(error)
    return ""


def trained(folder, array, chosen):
    """Trains a choice at one go and once more from the checkpoint in the middle; what differs, or ""."""
    config, _ = config_in(folder, array, chosen)
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        whole, again = Path(runs, "whole"), Path(runs, "again")
        loop.train(config, whole)
        shutil.copytree(whole, again)
        (again / "summary.json").unlink()
        (again / "samples.txt").unlink()
        shutil.rmtree(again / "checkpoints" / "4")
        loop.train(config, again)
        lines, more = ([found_at(workdir, step) for step in (3, 4)] for workdir in (whole, again))
        if lines != more:
            return f"metrics differ: {lines} {more}"
        if (whole / "samples.txt").read_text() != (again / "samples.txt").read_text():
            return "samples differ"
        if not all(math.isfinite(value) for line in lines for value in line.values()):
            return f"not finite: {lines}"
        leaves = (jax.tree.leaves(gptjax.load(workdir).params) for workdir in (whole, again))
        return "" if all(map(np.array_equal, *leaves)) else "parameters differ"


def found_at(workdir, step):
    """The newest losses and gradient norm of a step in metrics."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for line in lines if line["step"] == step for name, value in line.items()}
    return {name: found[name] for name in ("train/loss", "grad_norm", "val/loss") if name in found}


def written(folder):
    """The folder with the texts that all runs read."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]
    (folder / TEXT).write_text("".join(f"{line}.\n" for line in lines))
    (folder / PAIRS).write_text("".join(f"{line[:7]} {i}\t{line[-7:]}\n" for i, line in enumerate(lines)))
    for form in ("classes", "values", "choices", "tags", "spans"):
        records = [record(form, line.split()[:2], i) for i, line in enumerate(lines)]
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def record(form, words, i):
    """The i-th example of a form."""
    text = f"{' '.join(words)} {i}"
    return {
        "classes": {"text": text, "label": ("no", "yes")[i % 2]},
        "values": {"text": text, "label": i / 100},
        "choices": {"text": text, "choices": ["x", "z"], "label": i % 2},
        "tags": {"text": text.split(), "label": ["O", "C", "O"]},
        "spans": {"text": text, "said": words[1], "label": len(words[0]) + 1},
    }[form]


DOES = {"train": trained, "refuse": refusal}


def answer(folder, asked):
    """What came of a request, ["train", array, chosen]: "" or what went wrong."""
    do, array, chosen = asked
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return DOES[do](folder, array, chosen)
    except Exception:
        return traceback.format_exc() + said.getvalue()[-1000:]
    finally:
        jax.clear_caches()  # each program keeps memory maps, see conftest


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for line in sys.stdin:
            folder = Path(place)
            folder = folder if (folder / TEXT).exists() else written(folder)
            print(json.dumps(answer(folder, json.loads(line))), flush=True)
