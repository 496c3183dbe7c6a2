"""Preparation gives the same set for any number of processes and interruptions; its report and its errors."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, shared

from gptjax import prepare
from gptjax.data import shards
from gptjax.data.prepare import pipeline
from gptjax.data.tokenizers import tokenizers

SENTENCES = [
    "The model reads the text and writes it again, softly and with some care, as it has learnt.",
    "A token is a piece of text that has a number, and most words are one or two of them.",
    "Nobody knows what the weights have come to mean, but the loss goes down and that is that.",
    "It was in the garden that they met again, and of all the things to say they said nothing.",
]


WORDS = sorted({word.strip(",.") for sentence in SENTENCES for word in sentence.split()})


def corpus(folder, documents=60, seed=0):
    """Files of three formats with that many different documents."""
    rng = np.random.default_rng(seed)
    texts = [f"Document {i}. " + " ".join(rng.choice(WORDS, 120)) for i in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    third = documents // 3
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:third]))
    (folder / "b.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts[third : documents - 20]))
    for i, text in enumerate(texts[documents - 20 :]):
        (folder / f"c{i:03d}.txt").write_text(text)
    return texts


def prepared(call, tmp_path, *flags, output="set", **changes):
    """Runs the command on `tmp_path`/text with a tiny chunk and shard size, in this process."""
    made = {"input": tmp_path / "text", "output": tmp_path / output, "tokenizer": "bytes", "workers": 1} | changes
    return call(prepare, *flags, *(f"--{name}={value}" for name, value in made.items()))


def decoded(folder):
    """The texts of a set, in order, by side."""
    opened = shards.open_set(folder)
    tokenizer = opened.tokenizer()
    return {
        split: [
            tokenizer.decode([i for i in side.read(*record).tolist() if not tokenizer.is_special_token(i)])
            for record in side.records()
        ]
        for split, side in (("train", opened.train), ("held_out", opened.held_out))
    }


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 3000)


def test_documents_keep_their_order_and_the_report_adds_up(tmp_path, call, small_chunks):
    texts = corpus(tmp_path / "text")
    result = prepared(call, tmp_path, "--json", held_out=0.3)
    assert result.code == 0, result.err
    report, found = json.loads(result.out), decoded(tmp_path / "set")
    assert sorted(found["train"] + found["held_out"]) == sorted(texts)
    assert [text for text in texts if text in found["train"]] == found["train"], "order"
    assert 5 < len(found["held_out"]) < 30
    read = report["steps"][0]
    assert (read["documents_in"], read["bytes_in"]) == (60, sum(len(text.encode()) for text in texts))
    sides = report["splits"]
    assert sides["train"]["documents"] + sides["held_out"]["documents"] == report["steps"][-1]["documents_out"] == 60
    assert report["tokens"] == read["bytes_in"] + 60 and 0.99 < report["bytes_per_token"] < 1
    assert {p.name for p in (tmp_path / "set").iterdir() if p.suffix != ".npy"} == {
        "index.json", "report.json", "tokenizer",
    }  # fmt: skip
    assert not (tmp_path / "set.unfinished").exists()


def test_split_of_a_document_depends_on_its_text_alone(tmp_path, call):
    corpus(tmp_path / "text")
    assert prepared(call, tmp_path, held_out=0.3).code == 0
    before = decoded(tmp_path / "set")
    for path in (tmp_path / "text").glob("c*.txt"):
        path.rename(path.with_name("0" + path.name))
    assert prepared(call, tmp_path, output="again", held_out=0.3).code == 0
    after = decoded(tmp_path / "again")
    assert set(before["held_out"]) == set(after["held_out"]) and before["train"] != after["train"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


STEPS = "nfc,control,length,exact,near,personal"


def test_any_number_of_workers_and_any_interruption_give_the_same_set(tmp_path, call, small_chunks, monkeypatch):
    pytest.importorskip("datasketch")
    corpus(tmp_path / "text", 90)
    (tmp_path / "text" / "d.txt").write_text((tmp_path / "text" / "c003.txt").read_text())
    how = {"held_out": 0.2, "shard_tokens": 4000, "clean": STEPS, "min_words": 5}
    assert prepared(call, tmp_path, output="whole", **how).code == 0
    expected = contents(tmp_path / "whole")
    assert len(json.loads(expected[Path("index.json")])["splits"]["train"]) > 5
    assert prepared(call, tmp_path, output="parallel", **how | {"workers": 2}).code == 0
    assert contents(tmp_path / "parallel") == expected

    # Cut short after so many chunks, again and again, until nothing is left to do.
    take, left = pipeline.Builder._take, [0]

    def takes_some(self, outcome):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        take(self, outcome)

    monkeypatch.setattr(pipeline.Builder, "_take", takes_some)
    for _ in range(100):
        left[0] = 4
        result = prepared(call, tmp_path, output="cut", **how)
        if result.code == 0:
            break
        assert result.code == 130 and not (tmp_path / "cut").exists()
        assert not list((tmp_path / "cut.unfinished").glob(".*.part")), "nothing half-written stays"
    assert contents(tmp_path / "cut") == expected


@pytest.mark.slow
def test_preparation_killed_at_any_moment_resumes_to_the_same_set(tmp_path):
    corpus(tmp_path / "text", 15_000)
    how = ["--tokenizer=bytes", "--shard_tokens=100K", "--clean=nfc,exact", "--workers=2", f"--input={tmp_path}/text"]
    command = [sys.executable, "-m", "gptjax.prepare", *how]
    subprocess.run([*command, f"--output={tmp_path}/whole"], cwd=ROOT, check=True, capture_output=True)
    for attempt in range(2):
        process = subprocess.Popen(
            [*command, f"--output={tmp_path}/killed"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        shard = tmp_path / "killed.unfinished" / f"train_{2 * attempt:05d}.npy"
        until = time.monotonic() + 60
        while process.poll() is None and not shard.exists() and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)  # to the one that writes; its workers have to notice
        process.wait()
        assert not (tmp_path / "killed").exists()
        until = time.monotonic() + 20
        while alive_in(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not alive_in(process.pid), "workers outlive the one that they worked for"
    subprocess.run([*command, f"--output={tmp_path}/killed"], cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def alive_in(session):
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(path.parent.name)
    return found


def test_full_disk_leaves_no_partial_files_and_the_next_start_resumes(tmp_path, call, small_chunks, monkeypatch):
    corpus(tmp_path / "text", 90)
    how = {"shard_tokens": 4000, "clean": "exact"}
    assert prepared(call, tmp_path, output="whole", **how).code == 0
    append, room = shards.ArrayWriter.append, [60_000]

    def until_full(self, values):
        room[0] -= values.nbytes
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, values)

    monkeypatch.setattr(shards.ArrayWriter, "append", until_full)
    refusal = prepared(call, tmp_path, output="full", **how).refusal()
    assert "no space left on the disk" in refusal
    left = tmp_path / "full.unfinished"
    assert not (tmp_path / "full").exists() and not list(left.glob(".*"))
    done = {shard["files"][0]["file"] for shard in json.loads((left / "progress.json").read_text())["splits"]["train"]}
    assert {path.name for path in left.glob("train_*.npy") if path.name.count(".") == 1} == done != set()
    room[0] = 10**9
    assert prepared(call, tmp_path, output="full", **how).code == 0
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_duplicates_and_dropped_documents_are_counted_with_an_example(tmp_path, call, small_chunks):
    texts = corpus(tmp_path / "text", 30)
    with open(tmp_path / "text" / "z.jsonl", "w") as file:
        for text in [texts[3], texts[7], "too short", "", "Mail me at jane.doe@example.com, " + texts[9][12:]]:
            file.write(json.dumps({"text": text}) + "\n")
    result = prepared(call, tmp_path, "--json", clean="exact,length,personal", min_words=10)
    report = json.loads(result.out)
    assert {one["reason"]: (one["documents"], one["example"]) for one in report["dropped"]} == {
        "exact: exact duplicate of an earlier document": (2, texts[3][:160]),
        "length: fewer than 10 words": (1, "too short"),
        "read: empty": (1, ""),
    }
    steps = {step["step"]: step for step in report["steps"]}
    assert [steps[name]["documents_out"] for name in ("read", "exact", "length", "personal")] == [34, 32, 31, 31]
    assert steps["personal"]["changed"] == 1
    assert any("<EMAIL>" in text for side in decoded(tmp_path / "set").values() for text in side)
    readable = prepared(call, tmp_path, output="again", clean="exact,length,personal", min_words=10).out
    assert "exact duplicate of an earlier document" in readable and "bytes per token" in readable


@pytest.mark.parametrize("tokenizer", ["bpe:300", "chars"])
def test_trained_tokenizer_encodes_all_of_the_text(tmp_path, call, tokenizer):
    texts = corpus(tmp_path / "text")
    assert prepared(call, tmp_path, tokenizer=tokenizer).code == 0
    found = decoded(tmp_path / "set")
    assert sorted(found["train"] + found["held_out"]) == sorted(texts)
    assert shards.open_set(tmp_path / "set").tokenizer().name == tokenizer


def test_ids_are_those_of_the_tokenizer_itself(tmp_path, call):
    texts = corpus(tmp_path / "text")
    assert prepared(call, tmp_path, tokenizer="bpe:300", held_out=0).code == 0
    opened = shards.open_set(tmp_path / "set")
    tokenizer = opened.tokenizer()
    for record, text in zip(opened.train.records(), texts, strict=True):
        assert opened.train.read(*record).tolist() == [tokenizer.end, *tokenizer.encode_ordinary(text)]


def test_pairs_keep_where_the_prompt_ends(tmp_path, call):
    (tmp_path / "text").mkdir()
    rows = "".join(f"question {i}\tanswer {i}\n" for i in range(20))
    (tmp_path / "text" / "a.tsv").write_text(rows)
    result = prepared(call, tmp_path, prompt_key="0", text_key="1", prompt_ending="\\t", held_out=0)
    assert result.code == 0, result.err
    train = shards.open_set(tmp_path / "set").train
    for i, (record, prompt) in enumerate(zip(train.records(), train.prompts(), strict=True)):
        ids = bytes(train.read(record[0] + 1, record[1]).tolist())
        assert (ids[: prompt - 1], ids[prompt - 1 :]) == (f"question {i}\t".encode(), f"answer {i}".encode())


def test_pair_is_filtered_as_one_text_and_cleaned_on_both_sides(tmp_path, call):
    (tmp_path / "text").mkdir()
    rows = [
        ("Who is jane@example.com?", "She wrote to joe@example.com a long and careful letter about it."),
        ("a", "b"),
    ]
    (tmp_path / "text" / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    how = {"prompt_key": "0", "text_key": "1", "held_out": 0, "clean": "length,personal", "min_words": 10}
    assert prepared(call, tmp_path, **how).code == 0
    assert decoded(tmp_path / "set")["train"] == [
        "Who is <EMAIL>?\nShe wrote to <EMAIL> a long and careful letter about it."
    ]


# Training on what was prepared


@pytest.mark.slow
def test_training_on_a_prepared_set_equals_training_on_its_text(tmp_path, call, call_train):
    corpus(tmp_path / "text")
    prepared(call, tmp_path, tokenizer="bpe:300", held_out=0.2)
    for layout in ("flat", "packed", "examples"):
        workdir = tmp_path / layout
        result = call_train(workdir, data_path=tmp_path / "set", data_layout=layout)
        assert result.code == 0, result.err
        assert tokenizers.sha256(tokenizers.load(workdir / "tokenizer")) == tokenizers.sha256(
            tokenizers.load(tmp_path / "set" / "tokenizer")
        )
        config = json.loads((workdir / "config.json").read_text())
        assert config["data"]["tokenizer"] == "bpe:300" and config["model"]["vocabulary"] == 300
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert all(line["data/wait_ms"] >= 0 for line in lines)
        assert "is finished" in call_train(workdir, data_path=tmp_path / "set", data_layout=layout).err


@pytest.mark.slow
def test_mixture_changes_on_resume_and_is_recorded(tmp_path, call, call_train):
    for seed, name in enumerate(("one", "two", "three")):
        corpus(tmp_path / "text", seed=seed)
        prepared(call, tmp_path, output=name, held_out=0.2)
    workdir = tmp_path / "run"

    def trained(*weights, stop=None):
        mixture = tuple((str(tmp_path / name), weight) for name, weight in weights)
        changes = {"train_steps": 8, "data_mixture": mixture, "checkpoint_every_steps": 4}
        return call_train(workdir, **changes)

    from gptjax.runs import checkpoints

    save, saves = checkpoints.Checkpoints.save, []

    def interrupted(self, step, *arguments):
        save(self, step, *arguments)
        saves.append(step)
        self.wait()
        if step == 4 and len(saves) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", interrupted)
        assert trained(("one", 3), ("two", 1)).code == 130
        result = trained(("three", 1), ("one", 1))
    assert result.code == 0 and "mixture    changes after step 4" in result.err, result.err
    facts = json.loads((workdir / "data.json").read_text())
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert facts["mixings"] == [[0, {one: 3, two: 1}], [4, {three: 1, one: 1}]]
    assert set(facts["fingerprints"]) == {one, two, three}
    assert json.loads((workdir / "config.json").read_text())["data"]["mixture"] == [[three, 1], [one, 1]]


def refusal(call_train, tmp_path, **changes):
    result = call_train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    return result.refusal()


def test_faults_are_detected_before_anything_is_written(tmp_path, call, call_train):
    corpus(tmp_path / "text")
    for output, tokenizer in (("set", "bytes"), ("other", "bpe:300")):
        prepared(call, tmp_path, output=output, tokenizer=tokenizer, held_out=0.2)
    mixture = ((str(tmp_path / "set"), 1), (str(tmp_path / "gone"), 1))
    assert "gone is not a prepared set" in refusal(call_train, tmp_path, data_mixture=mixture)
    mixture = ((str(tmp_path / "set"), 1), (str(tmp_path / "other"), 1))
    assert "other was made with another tokenizer" in refusal(call_train, tmp_path, data_mixture=mixture)
    mixture = ((str(tmp_path / "set"), 1), (str(tmp_path / "other"), -1))
    assert "weights must be more than 0" in refusal(call_train, tmp_path, data_mixture=mixture)
    (tmp_path / "half.unfinished").mkdir()
    assert "is an unfinished preparation" in refusal(call_train, tmp_path, data_path=tmp_path / "half")
    shard = next((tmp_path / "set").glob("train_*0.npy"))
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-10])
    assert "truncated or was changed" in refusal(call_train, tmp_path, data_path=tmp_path / "set")
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    flipped = call(prepare, f"--verify={tmp_path / 'set'}")
    assert "train_00000.npy has changed since it was written" in flipped.refusal()
    shard.write_bytes(raw)
    assert call(prepare, f"--verify={tmp_path / 'set'}").out == "4 files are as they were written\n"


def test_resume_refuses_a_changed_set(tmp_path, call, call_train):
    corpus(tmp_path / "text")
    prepared(call, tmp_path, held_out=0.2)
    from gptjax.training import loop

    def stops(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_steps", stops)
        assert call_train(tmp_path / "run", data_path=tmp_path / "set").code == 130
    index = tmp_path / "set" / "index.json"
    index.write_text(index.read_text() + " ")
    assert "has changed since" in call_train(tmp_path / "run", data_path=tmp_path / "set").refusal()


# Refusals of the command


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"input": "nowhere/*.txt"}, "--input=nowhere/*.txt names no file"),
        ({"tokenizer": "gpt9"}, "unknown tokenizer 'gpt9'"),
        ({"clean": "nfc,lenght"}, "did you mean length"),
        ({"held_out": 1.5}, "--held_out=1.5 must be"),
        ({"text_key": "body"}, "has no 'body' (--text_key); it has text"),
        ({"max_document": 100}, "has a document of more than 100 bytes"),
        ({"document_start": "("}, "--document_start is not a regular expression"),
        ({"shard_tokens": "many"}, "is not an amount such as"),
        ({"clean": "length", "min_words": 1000}, "no document is left to train on; the reasons: length: fewer than"),
        ({"keep_scripts": "latn", "clean": "script"}, "did you mean latin"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(tmp_path, call, changes, expected):
    corpus(tmp_path / "text")
    (tmp_path / "text" / "b.csv").unlink()
    assert expected in prepared(call, tmp_path, **changes).refusal()
    assert not (tmp_path / "set").exists()


def test_set_is_never_overwritten_and_other_flags_do_not_resume(tmp_path, call, monkeypatch):
    corpus(tmp_path / "text")
    prepared(call, tmp_path)
    before = contents(tmp_path / "set")
    assert "exists; give another --output" in prepared(call, tmp_path).refusal()
    assert contents(tmp_path / "set") == before
    commit = pipeline.Builder._commit

    def stops(self, *arguments):
        commit(self, *arguments)
        raise KeyboardInterrupt

    assert prepared(call, tmp_path, output="new", text_key="body").code == 2
    monkeypatch.setattr(pipeline.Builder, "_commit", stops)
    assert prepared(call, tmp_path, output="new").code == 130, "nothing was lost by the mistake"
    monkeypatch.undo()
    assert "was started with other flags" in prepared(call, tmp_path, output="new", held_out=0.5).refusal()
    assert prepared(call, tmp_path, "--restart", output="new", held_out=0.5).code == 0


def test_interruption_at_the_very_end_leaves_only_the_rename(tmp_path, call, monkeypatch):
    corpus(tmp_path / "text")
    assert prepared(call, tmp_path, output="whole").code == 0

    def stops(*paths):
        raise KeyboardInterrupt

    for name in ("write_index", "os.rename"):
        target = shards if name == "write_index" else pipeline.os
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name.removeprefix("os."), stops)
            assert prepared(call, tmp_path, output=name).code == 130
        assert prepared(call, tmp_path, output=name).code == 0
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_foreign_folder_is_not_touched(tmp_path, call):
    corpus(tmp_path / "text")
    (tmp_path / "set.unfinished").mkdir()
    (tmp_path / "set.unfinished" / "diary.txt").write_text("mine")
    for flags in ([], ["--restart"]):
        assert "is not an unfinished preparation" in prepared(call, tmp_path, *flags).refusal()
    assert (tmp_path / "set.unfinished" / "diary.txt").read_text() == "mine"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak memory of 45 MB in many documents, by one process, next to that of 4 MB."""
    line = json.dumps({"text": " ".join(SENTENCES * 3)}) + "\n"
    peaks = []
    for times in (4_000, 40_000):
        (tmp_path / "a.jsonl").write_text(line * times)
        code = (
            "import sys; from gptjax import prepare; prepare.main(sys.argv[1:]); "
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        flags = [f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/{times}", "--tokenizer=bytes", "--workers=1"]
        done = subprocess.run(
            [sys.executable, "-c", code, *flags, "--json"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout.split()[-1]) // 1024)
    assert peaks[1] < peaks[0] + 20 < 200, peaks


# Real text


def test_wikitext_packs_into_rows_of_1024_that_are_97_percent_full(tmp_path, call):
    from gptjax.data.packing import pack

    path = shared("data/wikitext2")
    text = next(path.glob("*train*"))
    result = prepared(
        call, tmp_path, input=text, tokenizer="bytes", document_start="^ = [^=].*[^=] = $", held_out=0, clean="",
    )  # fmt: skip
    assert result.code == 0, result.err
    train = shards.open_set(tmp_path / "set").train
    assert train.documents > 500
    assert pack(train, 1024).efficiency(1024) >= 0.97


def test_tatoeba_and_code_alpaca_are_read_as_pairs(tmp_path, call):
    sets = {
        "tatoeba_en_zh/cmn.txt": dict(format="tsv", prompt_key="0", text_key="1"),
        "code_alpaca/new_codealpaca.json": dict(prompt_key="instruction,input", text_key="output"),
    }
    for number, (path, how) in enumerate(sets.items()):
        result = prepared(call, tmp_path, "--json", input=shared(f"data/{path}"), output=str(number), **how)
        assert result.code == 0, result.err
        report, train = json.loads(result.out), shards.open_set(tmp_path / str(number)).train
        assert report["steps"][0]["documents_in"] > 4_000 and (train.prompts() > 1).all()
        assert (
            sum(side["text_bytes"] for side in report["splits"].values())
            == report["tokens"] - train.documents - (report["splits"]["held_out"]["documents"])
        )


def test_command_prints_the_next_step(tmp_path, call):
    corpus(tmp_path / "text")
    out = prepared(call, tmp_path).out
    assert f"--config.data.path={tmp_path / 'set'}" in out
