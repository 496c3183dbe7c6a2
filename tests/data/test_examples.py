"""Examples of tasks: files, templates, loss weights; errors are one line."""

import gzip
import json

import numpy as np
import pytest
from conftest import shared, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import data
from gptjax.config.errors import ConfigError, DataError
from gptjax.data import chat, examples, layouts, records, task_formats
from gptjax.data.augment import Augment
from gptjax.data.batches import EvalBatches
from gptjax.data.records import Record, RecordOptions
from gptjax.data.tokenizers import tokenizers
from gptjax.runs import config as configs

BYTES = tokenizers.bytes_encoding()
END = BYTES.end
RECORDS = [{"text": f"text {i} ", "label": "yes" if i % 3 else "no"} for i in range(30)]


def written(path, records):
    """A file of records in the format that its name says."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(one) + "\n" for one in records))
        case ".json":
            path.write_text(json.dumps(records))
        case ".csv" | ".tsv":
            mark = "," if path.suffix == ".csv" else "\t"
            path.write_text("\n".join(mark.join(row) for row in [list(records[0]), *(one.values() for one in records)]))
        case ".parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        case ".gz":
            path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records).encode()))
    return path


def settings_of(path="none", layout="examples", context=64, **of_examples):
    """`config.data` of a run on examples."""
    config = tiny_config(data_path=path, data_layout=layout, model_context=context)
    with config.unlocked():
        config.data.examples.update(of_examples)
    return config.data


def set_of(records, config):
    return examples.to_token_set(
        BYTES, [Record(one, f"record {i}") for i, one in enumerate(records, 1)], config, "", "some"
    )


def rows_of(tokens, config):
    rows = layouts.LAYOUTS[config.layout](tokens, config.context, 0, Augment(), "known")
    return [rows.row(0, k) for k in range(rows.per_epoch)]


def learnt_of(row):
    """Returns the text of the weighted targets of a row, piece by piece; the end is written as a bar."""
    ids = np.where(row["weights_BT"] > 0, row["targets_BT"], -1).tolist()
    pieces = "".join("\0" if token < 0 else "|" if token == END else chr(token) for token in ids)
    return [piece for piece in pieces.split("\0") if piece]


def read_of(row):
    return BYTES.decode(row["inputs_BT"][row["segments_BT"] > 0].tolist()).replace("<|endoftext|>", "|")


# Files.


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"])
def test_a_record_is_the_same_from_every_format(name, tmp_path):
    path = written(tmp_path / name, RECORDS)
    assert [one.fields for one in records.read(path)] == RECORDS


def test_columns_without_a_first_line_are_named_by_config(tmp_path):
    (tmp_path / "a.tsv").write_text('a "good" one\t1\n\nbad\t0\n')
    found = list(records.read(tmp_path / "a.tsv", RecordOptions(("text", "label"))))
    assert [one.fields for one in found] == [{"text": 'a "good" one', "label": "1"}, {"text": "bad", "label": "0"}]
    assert found[1].where.endswith("a.tsv, line 3")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 is not an object"),
        ("a.json", '{"text": "a"}', "not a list"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", "line 3 has 1 fields and not the 2"),
        ("a.jsonl.gz", "not packed", "is damaged"),
        ("a.doc", "a", "is not a file of records"),
    ],
)
def test_malformed_file_is_reported_by_line(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        list(records.read(tmp_path / name))


def test_a_directory_has_splits_and_a_file_is_divided_by_hash(tmp_path):
    for split in ("train", "dev", "test", "odd"):
        written(tmp_path / f"{split}.jsonl", [{"text": split, "label": "x"}])
    config = settings_of(tmp_path, form="text")
    assert [examples.read(config, split)[0].fields["text"] for split in ("train", "val", "test", "odd")] == [
        "train", "dev", "test", "odd",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no examples for 'other'; there is dev.jsonl, odd.jsonl"):
        examples.read(config, "other")
    alone = settings_of(written(tmp_path / "all.jsonl", RECORDS * 5), form="text")
    train, held_out = ([one.fields["text"] for one in examples.read(alone, split)] for split in ("train", "val"))
    assert len(train) + len(held_out) == 150 and not set(train) & set(held_out) and held_out
    with pytest.raises(DataError, match="no examples for 'test'"):
        examples.read(alone, "test")


def test_shots_are_sampled_per_label_by_their_own_seed(tmp_path):
    config = dict(form="classes", labels=("no", "yes"), shots=3)
    for split in ("train", "val"):
        written(tmp_path / f"{split}.jsonl", RECORDS)
    drawn = [
        [one.fields["text"] for one in examples.read(settings_of(tmp_path, **config, shot_seed=s), "train")]
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for texts in drawn:
        labels = [one["label"] for one in RECORDS if one["text"] in texts]
        assert sorted(labels) == ["no"] * 3 + ["yes"] * 3
    assert len(examples.read(settings_of(tmp_path, **config), "val")) == 30
    assert len(examples.read(settings_of(tmp_path, form="text", shots=4), "train")) == 4
    with pytest.raises(DataError, match="shots=11, and there are 10 examples with the label 'no'"):
        examples.read(settings_of(tmp_path, **config | {"shots": 11}), "train")


# Texts that are learnt.


@pytest.mark.parametrize("layout", ["examples", "packed"])
def test_loss_is_on_answers_and_their_end_alone(layout):
    config = settings_of(layout=layout, form="text", template="{text}->", answer="{label}", context=40)
    rows = rows_of(set_of(RECORDS, config), config)
    learnt = sorted(piece for row in rows for piece in learnt_of(row))
    assert learnt == sorted(f"{one['label']}|" for one in RECORDS)
    if layout == "packed":
        assert len(rows) < 20


def test_without_an_answer_all_of_a_text_is_in_the_loss():
    config = settings_of(form="text", template="{text}", answer="", context=40)
    assert learnt_of(rows_of(set_of(RECORDS[:1], config), config)[0]) == ["text 0 |"]


def test_packed_and_padded_rows_have_the_same_predictions():
    """Each prediction with a weight, and all that it attends to, is the same in both."""

    def asked(layout):
        config = settings_of(layout=layout, form="instructions", context=200)
        records = [{"instruction": "i" * i, "input": "x" * (i % 2), "output": f"o{i}"} for i in range(1, 9)]
        found = []
        for row in rows_of(set_of(records, config), config):
            segments = row.get("segments_BT", np.ones(200, int))
            for t in np.flatnonzero(row["weights_BT"]):
                before = row["inputs_BT"][: t + 1][segments[: t + 1] == segments[t]]
                found.append((tuple(before.tolist()), int(row["targets_BT"][t])))
        return sorted(found)

    assert asked("packed") == asked("examples") != []


def test_instructions_are_alpacas():
    config = settings_of(form="instructions", context=200)
    one = {"instruction": "Add.", "input": "1 1", "output": "2"}
    row = rows_of(set_of([one], config), config)[0]
    text = BYTES.decode(row["inputs_BT"][: int(np.flatnonzero(row["weights_BT"])[-1]) + 1].tolist())
    assert text == "<|endoftext|>### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2"
    assert learnt_of(row) == ["2|"]
    assert "Input" not in "".join(
        piece for piece, _ in task_formats.instructions(Record(one | {"input": ""}, "here"), config)
    )


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(max_codepoint=900), max_size=60), st.text(min_size=1, max_size=9), st.integers(24, 60))
def test_a_long_text_loses_its_end_and_never_its_answer(text, answer, context):
    config = settings_of(form="text", template="Q: {text} A:", answer=" {label}", context=context)
    form, c = task_formats.TASK_FORMATS["text"], config.examples
    room = max(context, len(f"Q:  A: {answer}".encode()))
    (one,), is_long = form.tokenize(Record({"text": text, "label": answer}, "here"), c, BYTES, room)
    whole = f"Q: {text} A: {answer}"
    assert is_long == (len(whole.encode()) > room) and len(one.ids) <= room and one.ends
    said = BYTES.decode(one.ids)
    assert (
        said.startswith("Q: ") and said.endswith(f" A: {answer}") and text.startswith(said[3 : -len(f" A: {answer}")])
    )


def test_long_examples_are_truncated_dropped_or_refused_and_counted(capsys):
    records = [{"text": "t" * length, "label": "yes"} for length in (3, 30, 60, 90)]
    # A text has 40 inputs: the end, the t, a colon, and the three letters of the answer.
    for how, reported, lengths in (("cut", "cut", [3, 30, 35, 35]), ("leave_out", "left out", [3, 30])):
        config = settings_of(form="text", template="{text}:", context=40, too_long=how)
        rows = rows_of(set_of(records, config), config)
        assert [row["inputs_BT"].tolist().count(ord("t")) for row in rows] == lengths
        assert all(learnt_of(row) == ["yes|"] for row in rows)
        assert f"2 of 4 of some are longer than 40 tokens and are {reported}" in capsys.readouterr().err
    with pytest.raises(DataError, match="2 of 4 of some are longer than 40 tokens .*the first in record 3"):
        set_of(records, settings_of(form="text", template="{text}:", context=40, too_long="refuse"))


@pytest.mark.parametrize("form", [dict(form="classes", labels=("no", "yes")), dict(form="text", answer="{text}")])
def test_examples_without_text_or_answer_are_dropped_and_counted(form, capsys):
    records = [{"text": text, "label": "yes"} for text in ("", "some", "", "more")]
    config = settings_of(template="{text}", **form)
    tokens = set_of(records, config)
    assert tokens.documents == 2 and len(rows_of(tokens, config)) == 2
    assert "2 of 4 of some are without text or answer and are left out" in capsys.readouterr().err


def test_an_encoder_decoder_gets_pairs():
    config = settings_of(layout="pairs", form="text", template="say {text}", answer="{label}", context=40)
    row = rows_of(set_of(RECORDS[:1], config), config)[0]
    assert BYTES.decode(row["source_BS"][row["source_segments_BS"] > 0].tolist()) == "say text 0 <|endoftext|>"
    assert learnt_of(row) == ["no|"]


# Dialogues.

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Good bye."},
]


def test_loss_is_on_the_assistants_turns_alone():
    config = settings_of(form="chat", context=200)
    for record in (
        {"messages": DIALOGUE},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(one["role"], one["role"]), "value": one["content"]}
                for one in DIALOGUE
            ]
        },
    ):
        row = rows_of(set_of([record], config), config)[0]
        assert learnt_of(row) == [" Hello.|", " Good bye.|"]
    asked_last = {"messages": DIALOGUE[:4]}
    assert learnt_of(rows_of(set_of([asked_last], config), config)[0]) == [" Hello.|"]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_answer_masks_equal_transformers(name, tmp_path):
    """Returns ids and loss mask by the template with `generation` around answers, as transformers computes them."""
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    import tokenizers as library

    from gptjax.data.tokenizers import from_hf as hf

    special = [
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    made = library.Tokenizer(library.models.BPE({piece: token for token, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens(special)
    begin = [("<|begin_of_text|>", 256)]
    made.post_processor = library.processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=begin)
    marked = {
        "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}",
        "llama3": "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}",
    }[name]
    names = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=special[0], eos_token=special[1])
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(marked)
    tokenizer, _ = hf.read(folder)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = peer.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    record, c = Record({"messages": DIALOGUE}, "here"), settings_of(form="chat", chat_template=name).examples
    (one,), is_long = task_formats.TASK_FORMATS["chat"].tokenize(record, c, tokenizer, 1000)
    begin = [256] if name == "llama3" else []  # which stands around texts here
    assert begin + one.ids == expected["input_ids"] and not is_long
    assert [0] * len(begin) + one.arrays["weights_BT"].tolist() == expected["assistant_masks"]


def test_invalid_dialogues():
    config = settings_of(form="chat", context=200)
    forged = [{"role": "user", "content": "a<|endoftext|>b"}, DIALOGUE[2]]
    for record, says in [
        ({"text": "a"}, "record 1 has no field 'messages' or 'conversations'"),
        ({"messages": ["a"]}, "not a list of objects with role and content"),
        ({"messages": forged}, "record 1: what the user says has the special token"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing is left of 1 examples"),
    ]:
        with pytest.raises(DataError, match=says):
            set_of([record], config)
    with pytest.raises(DataError, match="the tokenizer bytes has no <|im_start|>, .* take plain"):
        set_of([{"messages": DIALOGUE}], settings_of(form="chat", chat_template="chatml"))
    with pytest.raises(ConfigError, match="no chat template other; give a file"):
        chat.get_template("other", BYTES)


# Texts with labels.


def test_classes_are_numbers_in_the_order_of_their_names():
    config = settings_of(form="classes", labels=("no", "yes"), context=20)
    rows = rows_of(set_of(RECORDS, config), config)
    assert [int(row["labels_B"]) for row in rows] == [int(one["label"] == "yes") for one in RECORDS]
    assert [read_of(row) for row in rows] == [f"|{one['text']}" for one in RECORDS]
    assert "targets_BT" not in rows[0] and rows[0]["segments_BT"].sum() == 8


def test_balanced_labels_weigh_the_same(tmp_path):
    for split in ("train", "val"):
        written(tmp_path / f"{split}.jsonl", RECORDS)
    loaded = data.load(settings_of(tmp_path, form="classes", labels=("no", "yes"), balanced=True), BYTES)
    answers = loaded.train["text"].arrays
    by_label = [answers["weights_B"][answers["labels_B"] == label].sum() for label in (0, 1)]
    np.testing.assert_allclose(by_label, [15, 15], rtol=1e-6)
    assert set(loaded.held_out.arrays["weights_B"]) == {1.0}


def test_two_texts_have_different_types():
    config = settings_of(form="classes", labels=("no", "yes"), template="{a}", second="{b}", label="is", context=20)
    row = rows_of(set_of([{"a": "one", "b": "two", "is": "no"}], config), config)[0]
    assert read_of(row) == "|one|two"
    assert row["types_BT"].tolist() == [0] * 5 + [1] * 3 + [0] * 12


def test_values_choices_and_tags():
    config = settings_of(form="values", label="stars", context=20)
    rows = rows_of(set_of([{"text": "a", "stars": "4.5"}, {"text": "b", "stars": -1}], config), config)
    assert [float(row["values_B"]) for row in rows] == [4.5, -1.0]

    config = settings_of(form="choices", template="{q}", label="right", context=20)
    given = [{"q": "2+2", "choices": ["4", "5"], "right": right} for right in (0, "B", "4")]
    rows = rows_of(set_of(given, config), config)
    assert [int(row["labels_B"]) for row in rows] == [0, 1, 0]
    assert rows[0]["inputs_BT"].shape == (2, 20)
    texts = [
        BYTES.decode(ids[real > 0].tolist())
        for ids, real in zip(rows[0]["inputs_BT"], rows[0]["segments_BT"], strict=True)
    ]
    assert texts == ["<|endoftext|>2+2 4", "<|endoftext|>2+2 5"]

    config = settings_of(form="tags", template="{words}", label="tags", labels=("O", "B"), context=20)
    row = rows_of(set_of([{"words": ["in", "Rome", "now"], "tags": ["O", "B", "O"]}], config), config)[0]
    first = np.flatnonzero(row["weights_BT"])
    assert [read_of(row)[at] for at in first] == ["i", " ", " "] and row["labels_BT"][first].tolist() == [0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), st.data())
def test_a_span_is_where_the_answer_stands(whole, drawn):
    start = drawn.draw(st.integers(0, len(whole) - 1))
    said = whole[start : drawn.draw(st.integers(start + 1, len(whole)))]
    config = settings_of(form="spans", template="who?", second="{text}", answer="{said}", label="at", context=200)
    row = rows_of(set_of([{"text": whole, "said": said, "at": start}], config), config)[0]
    first, last = row["spans_B2"]
    assert BYTES.decode(row["inputs_BT"][first : last + 1].tolist()) == said


def test_truncated_span_is_dropped_and_counted(capsys):
    config = settings_of(form="spans", template="q", second="{text}", answer="{said}", label="at", context=20)
    given = [{"text": "a" * 30 + "b", "said": said, "at": at} for said, at in (("b", 30), ("aa", 0))]
    tokens = set_of(given, config)
    assert tokens.documents == 1 and "2 of 2 of some are longer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "record", "says"),
    [
        ("classes", {"label": "yes"}, "record 1, has no field 'text', which .*template asks for; it has label"),
        ("classes", {"text": "a"}, "no field 'label', which data.examples.label asks for"),
        ("classes", {"text": "a", "label": "maybe"}, "the label 'maybe', which .*labels does not name: no, yes"),
        ("classes", {"text": ["a"], "label": "no"}, "record 1 has 'text' that is list and not text"),
        ("values", {"text": "a", "label": "much"}, "'label' that is not a number: 'much'"),
        ("choices", {"text": "a", "label": 2, "choices": ["x", "y"]}, "none of its 2 choices: 2"),
        ("choices", {"text": "a", "label": 0, "choices": "xy"}, "'choices' that is not a list"),
        ("tags", {"text": ["a"], "label": ["no", "yes"]}, "1 words, and 'label' is not a list of as many"),
        ("spans", {"text": "a", "label": 3}, "does not begin at 3"),
    ],
)  # fmt: skip
def test_malformed_records_are_reported_by_position(form, record, says):
    config = settings_of(form=form, labels=("no", "yes"), second="{text}" if form == "spans" else "", answer="a")
    with pytest.raises(DataError, match=says):
        set_of([record], config)


def test_label_without_an_example_is_refused(tmp_path):
    path = written(tmp_path / "a.jsonl", RECORDS * 4)
    with pytest.raises(DataError, match="no example to learn the label 'maybe' .* from"):
        data.load(settings_of(path, form="classes", labels=("no", "yes", "maybe")), BYTES)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(layout="flat", form="text"), "form=text needs data.layout=examples, not flat"),
        (
            dict(layout="packed", form="classes", labels=("a", "b")),
            "form=classes needs data.layout=examples, not packed",
        ),
        (dict(form="classes"), "names 0 labels .*model.labels is 2"),
        (dict(form="text", too_long="drop"), "must be cut, leave_out or refuse"),
        (dict(form="clases"), "no choice 'clases'; did you mean classes?"),
        (dict(form="text", balanced=True), "balanced is for form=classes only"),
    ],
)
def test_invalid_configs(changes, says):
    from gptjax.training import setup

    config = tiny_config(data_path="none", data_layout=changes.pop("layout", "examples"))
    with config.unlocked():
        config.data.examples.update(changes)
    with pytest.raises(ConfigError, match=says):
        setup.check(configs.resolve(config))


def test_form_and_objective_have_to_go_together():
    from gptjax.training import setup

    config = tiny_config(
        data_path="none", data_layout="examples", model_task="classification", train_objective="classification"
    )
    with pytest.raises(
        ConfigError, match="classification learns from examples with answers; set data.examples.form=classes"
    ):
        setup.check(config)
    with config.unlocked():
        config.data.examples.update(form="values")
    with pytest.raises(ConfigError, match="set data.examples.form=classes"):
        setup.check(config)


def test_texts_with_token_labels_are_not_augmented():
    config = settings_of(form="text")
    with pytest.raises(DataError, match="augment moves tokens"):
        layouts.examples(set_of(RECORDS, config), 64, 0, Augment(delete=0.5), "")
    config = settings_of(form="classes", labels=("no", "yes"), context=20)
    tokens = set_of(RECORDS, config)
    plain, shorter = (layouts.examples(tokens, 20, 0, augment, "") for augment in (Augment(), Augment(delete=0.5)))
    for k in range(10):
        (row, own), size = (rows.row(0, k) for rows in (plain, shorter)), 8 + (k > 9)
        assert own["inputs_BT"][0] == row["inputs_BT"][0] == END and own["labels_B"] == row["labels_B"]
        assert own["segments_BT"].sum() <= row["segments_BT"].sum() == size
    assert any(shorter.row(0, k)["segments_BT"].sum() < 8 for k in range(10))


def test_sentiment_of_films(tmp_path):
    config = settings_of(shared("data/sst2"), form="classes", fields=("text", "label"), labels=("0", "1"), context=400)
    loaded = data.load(config, BYTES)
    assert (loaded.train["text"].documents, loaded.held_out.documents) == (6920, 872)
    batch = EvalBatches(loaded.held_out_rows(config), 8)[0]
    assert (
        read_of({name: x[0] for name, x in batch.items()}) == "|one long string of cliches"
        and batch["labels_B"][0] == 0
    )
