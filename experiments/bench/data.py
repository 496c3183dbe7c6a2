"""Times the data engine: batches from memory-mapped shards, the opening of a large set, and preparing beside tiktoken.

    python experiments/bench/data.py
    python experiments/bench/data.py --text='novels/*.txt' --tokenizer=gpt2 --save data

Batches are timed on one processor, each layout by itself and two sets mixed. The large set is made on the fly, a
billion tokens in sparse files. Preparing takes turns with `tiktoken.Encoding.encode_ordinary_batch` over the same
documents in memory, on all processors; preparing also reads them, hashes them for the split and writes shards.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_step import machine, versions

from gptjax.data import shards, token_sets
from gptjax.data.augment import Augment
from gptjax.data.batches import Batches, MixtureStage, Stage
from gptjax.data.formats import ReadOptions
from gptjax.data.layouts import LAYOUTS, shuffle_and_repeat
from gptjax.data.prepare import pipeline
from gptjax.data.prepare.cleaning import CleaningOptions
from gptjax.data.prepare.documents import Task
from gptjax.data.tokenizers import tokenizers

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]

Figures = dict[str, Any]


def resident_bytes() -> int:
    """Memory of this process that no file stands behind."""
    fields = Path("/proc/self/status").read_text(encoding="utf-8").split("RssAnon:")[1].split()
    return int(fields[0]) * 1024


def fill(folder: Path, tokens: int, per_shard: int, document: int) -> Path:
    """A prepared set of so many tokens, all 0, in sparse files, cut into documents of one length."""
    tokenizer = tokenizers.bytes_encoding()
    tokenizers.save(tokenizer, folder / "tokenizer")
    splits: dict[str, list[Figures]] = {"train": [], "held_out": []}
    for split, sizes in (("train", [per_shard] * (tokens // per_shard)), ("held_out", [per_shard // 100])):
        for number, count in enumerate(sizes):
            ends = np.arange(document, count + 1, document)
            ids, cuts = (folder / f"{split}_{number:05d}{kind}.npy" for kind in ("", ".ends"))
            with ids.open("wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (len(ends) * document,)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(shards.HEADER + 2 * len(ends) * document)
            np.save(cuts, ends)
            files = [{"file": path.name, "bytes": path.stat().st_size, "sha256": ""} for path in (ids, cuts)]
            totals = {"documents": len(ends), "tokens": len(ends) * document, "text_bytes": 0}
            splits[split].append(totals | {"files": files})
    made_with = {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab, "sha256": tokenizers.sha256(tokenizer)}
    closing = token_sets.delimiters_of(tokenizer).closing
    shards.write_index(folder, {"tokenizer": made_with | {"closing": closing}, "splits": splits})
    return folder


def opening(tokens: int) -> Figures:
    """Seconds and memory that opening a set of so many tokens, and its first batch, take."""
    with tempfile.TemporaryDirectory() as folder:
        path = fill(Path(folder), tokens, min(tokens, 100_000_000), 1000)
        before, start = resident_bytes(), time.perf_counter()
        opened = shards.open_set(path)
        seconds = time.perf_counter() - start
        batches = of_layout({"a": opened.train}, "flat", 1024, 8)
        batches[0]
        found = {"tokens": len(opened.train), "open_seconds": seconds, "memory_bytes": resident_bytes() - before}
        return found | {"first_batch_seconds": time.perf_counter() - start}


def of_layout(sets: dict[str, token_sets.TokenSet], layout: str, context: int, batch_size: int) -> Batches:
    """Batches of the sets, mixed three to one where there are two."""
    mixing = MixtureStage(0, dict(zip(sets, (3, 1), strict=False)))

    def rows(name: str, context: int) -> Any:
        return shuffle_and_repeat(
            LAYOUTS[layout](sets[name], context, 0, Augment(), f"bench {name} {len(sets[name])}"), 0
        )

    return Batches(rows, [Stage(0, batch_size, context)], [mixing])


def rate(batches: Batches, seconds: float) -> float:
    """Tokens per second of batches asked for one after the other."""
    batches[0]
    start, count, step = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        step += 1
        count += batches[step]["inputs_BT"].size
    return count / (time.perf_counter() - start)


def batching(path: Path, seconds: float) -> Figures:
    """Tokens per second by layout and context, on one processor, from a prepared set."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})
    try:
        train = shards.open_set(path).train
        found = {}
        for layout in sorted(set(LAYOUTS) - {"pairs"}):  # novels have none
            for context in (128, 1024):
                found[f"{layout}, {context}"] = rate(of_layout({"a": train}, layout, context, 16), seconds)
        both = of_layout({"a": train, "b": shards.open_set(path).train}, "flat", 1024, 16)
        found["flat, two sets mixed, 1024"] = rate(both, seconds)
    finally:
        os.sched_setaffinity(0, processors)
    return found


def alone(texts: list[str], tokenizer: str, workers: int) -> float:
    """Seconds that tiktoken takes for the texts."""
    encoding = tokenizers.build(tokenizer, [])
    start = time.perf_counter()
    encoding.encode_ordinary_batch(texts, num_threads=workers)
    return time.perf_counter() - start


def ours(text: str, tokenizer: str, workers: int, output: Path) -> float:
    """Seconds of preparing, from the start of reading to the finished set; processes are started before."""
    task = Task(ReadOptions(), (), CleaningOptions(), 0.05)
    settings = pipeline.Settings((text,), tokenizer, task)
    shutil.rmtree(output, ignore_errors=True)
    times: list[float] = []
    run: Callable[..., None] = pipeline.Builder.run

    def timed(self: pipeline.Builder, pool: Any) -> None:
        list(pool.map(ready, [(0.3,)] * workers))
        times.append(time.perf_counter())
        run(self, pool)

    pipeline.Builder.run = timed  # type: ignore[method-assign]
    try:
        pipeline.prepare(settings, output, workers)
    finally:
        pipeline.Builder.run = run  # type: ignore[method-assign]
    return time.perf_counter() - times[0]


def ready(task: Task, tokenizer: Path, seconds: float) -> None:
    """Keeps a worker until all have begun, with its tokenizer read."""
    from gptjax.data.prepare.documents import _worker

    _worker(task, tokenizer)
    time.sleep(seconds)


def tokenizing(text: str, tokenizer: str, rounds: int, output: Path) -> Figures:
    """Preparing and tiktoken in turns: MB/s of each, the median ratio."""
    files = pipeline.find_inputs([text])
    texts = [source.path.read_text(encoding="utf-8") for source in files]
    size, workers = sum(len(text.encode()) for text in texts), os.cpu_count() or 1
    pairs = []
    for number in range(rounds):
        pair = ours(text, tokenizer, workers, output), alone(texts, tokenizer, workers)
        pairs.append(pair)
        print(f"round {number + 1} of {rounds}: preparing {pair[0]:.1f} s, tiktoken {pair[1]:.1f} s", file=sys.stderr)
    return {
        "megabytes": size / 1e6,
        "preparing_megabytes_per_second": size / 1e6 / statistics.median(a for a, _ in pairs),
        "tiktoken_megabytes_per_second": size / 1e6 / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "rounds": pairs,
    }


def main() -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    novels = REPO.parent / "shared" / "data" / "english_novels"
    parser.add_argument("--text", default=f"{novels}/*_*.txt", help="files to prepare (%(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="of tiktoken (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of batches of each kind (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10**9, help="of the large set (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one object and nothing else on stdout")
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.json")
    flags = parser.parse_args()
    vocabularies = REPO.parent / "shared" / "tiktoken_cache"
    if vocabularies.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(vocabularies))
    result: Figures = {"ratio": None, "opening": opening(flags.tokens)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set"
        if Path(flags.text).parent.is_dir():
            result["tokenizing"] = tokenizing(flags.text, flags.tokenizer, flags.rounds, path)
            result["ratio"] = result["tokenizing"]["ratio"]
        else:
            print(f"bench: there is no {flags.text}, so nothing is prepared (--text=FILES)", file=sys.stderr)
            path.mkdir()
            fill(path, 10_000_000, 5_000_000, 700)
        result["batches_tokens_per_second"] = batching(path, flags.seconds)
    result |= {
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python experiments/bench/data.py", *(a for a in sys.argv[1:] if "--text" not in a)]),
    }
    if flags.save:
        (HERE / "results" / f"{flags.save}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if flags.json else readable(result))


def readable(result: Figures) -> str:
    """The result for a person."""
    large = result["opening"]
    lines = [
        f"a set of {large['tokens']:,} tokens opens in {large['open_seconds'] * 1e3:.1f} ms with "
        f"{large['memory_bytes'] / 2**20:.1f} MiB, and gives a batch after {large['first_batch_seconds'] * 1e3:.0f} ms",
        *(f"{name:30s} {value / 1e6:8.2f} M tokens/s" for name, value in result["batches_tokens_per_second"].items()),
    ]
    if "tokenizing" in result:
        each = result["tokenizing"]
        lines.append(
            f"preparing {each['megabytes']:.0f} MB: {each['preparing_megabytes_per_second']:.1f} MB/s, tiktoken alone "
            f"{each['tiktoken_megabytes_per_second']:.1f} MB/s; ratio {each['ratio']:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
