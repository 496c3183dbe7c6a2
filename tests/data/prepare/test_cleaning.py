"""Cleaning steps: effect on a text, refused options, and reasons that can be counted."""

import json
import random
import re
import unicodedata

import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.prepare import cleaning, dedup
from gptjax.data.prepare.cleaning import CleaningOptions, Dropped

PROSE = (
    "It was a bright cold day in the north, and the clocks of the town had begun to strike when she came out. "
    "Nobody had thought to tell her that the bridge was closed, so she walked along the river with her dog, "
    "past the mill and the two old boats, until the path turned and there was nothing to be seen but reeds. "
)


def step(name, **options):
    return cleaning.STEPS[name](CleaningOptions(**options))


def file_of(folder, content, name="file.txt"):
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


# -- the table


def test_names_are_all_steps_in_the_recommended_order():
    assert set(cleaning.NAMES) == {*cleaning.STEPS, "exact", "near"} and len(set(cleaning.NAMES)) == 11
    assert cleaning.NAMES[:2] == ("nfc", "control") and cleaning.NAMES[-2:] == ("exact", "near")
    cleaning.check_names(cleaning.NAMES)
    cleaning.check_names(())


@pytest.mark.parametrize(
    "names, expected",
    [
        (["nfc", "lenght"], "unknown step 'lenght'; did you mean length?"),
        (["nfc", "length", "nfc"], "the step nfc is named twice"),
        (["xyz"], "unknown step 'xyz'; there are nfc, control, length"),
    ],
)
def test_invalid_names_are_refused(names, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        cleaning.check_names(names)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("length", {"min_words": 9, "max_words": 8}, "min_words=9 must be at least 0 and at most max_words=8"),
        ("script", {}, "needs keep_scripts or drop_scripts"),
        ("script", {"keep_scripts": ("latn",)}, "unknown script 'latn'; did you mean latin?"),
        ("script", {"drop_scripts": ("qq",)}, "unknown script 'qq'; there are han, japanese"),
        ("blocklist", {}, "needs blocklist, a file"),
        ("decontaminate", {}, "needs evaluation, the files"),
        ("near", {"near_threshold": 1.5}, "near_threshold is 1.5; it must be more than 0 and at most 1"),
        ("near", {"near_shingle": 0}, "near_shingle is 0; it must be at least 1"),
        ("near", {"near_permutations": 1}, "near_permutations=1 cannot tell near_threshold=0.7"),
    ],
)
def test_invalid_options_are_refused_before_a_document_is_read(name, options, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        cleaning.check([name], CleaningOptions(**options))


@pytest.mark.parametrize("name, option", [("blocklist", "blocklist"), ("decontaminate", "evaluation")])
def test_files_that_are_missing_are_refused(tmp_path, name, option):
    path = str(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"cannot read .*none.txt"):
        cleaning.check([name], CleaningOptions(**{option: path if option == "blocklist" else (path,)}))


def full_options(folder):
    return CleaningOptions(
        drop_scripts=("arabic",),
        blocklist=file_of(folder, "forbidden phrase\n", "terms.txt"),
        evaluation=(file_of(folder, "one two three four five six seven eight nine ten eleven twelve thirteen"),),
    )


def test_good_text_goes_through_all_steps_unchanged(tmp_path):
    options = full_options(tmp_path)
    cleaning.check(cleaning.NAMES, options)
    for make in cleaning.STEPS.values():
        assert make(options)(PROSE) == PROSE


def test_no_document_is_too_strange_for_a_step(tmp_path):
    options = full_options(tmp_path)
    strange = ["", " \n", "\ud800", "\0", "\u0301", "字", "#", "…", "1", "a" * 100_000, "\n" * 1000, "🤷🏽‍♀️"]
    for name in cleaning.NAMES:
        run = (cleaning.STEPS | cleaning.SIGNATURES)[name](options)
        for text in strange:
            result = run(text)
            assert not isinstance(result, Dropped) or result.reason
            assert name in cleaning.SIGNATURES or isinstance(result, str | Dropped)
    made = {name: make(options) for name, make in cleaning.STEPS.items()}
    assert {name: made[name]("") for name in made} == dict.fromkeys(made, "") | {
        "length": Dropped("fewer than 50 words"),
        "boilerplate": Dropped("fewer than 2 English stop words"),
    }


def test_reasons_are_the_same_for_all_documents(tmp_path):
    options = full_options(tmp_path)
    rng = random.Random(0)
    words = [*PROSE.split(), "#", "...", "1", "- x\n", "\n", "Привет", "字", "forbidden phrase", "\n\n", *["مرحبا"] * 6]
    texts = [" ".join(rng.choices(rng.sample(words, 9), k=rng.randint(0, 150))) for _ in range(600)]
    reasons = {
        result.reason
        for make in cleaning.STEPS.values()
        for result in map(make(options), texts)
        if isinstance(result, Dropped)
    }
    assert {"fewer than 50 words", "more than 0.1 hash signs a word", "script arabic"} <= reasons
    assert 10 < len(reasons) < 25 and all(len(reason) < 60 and "\n" not in reason for reason in reasons)


# -- characters


def test_nfc():
    assert step("nfc")("e\u0301 \u1112\u1161\u11ab \u212b") == "é 한 Å"


def test_control_removes_control_characters():
    control = step("control")
    assert control("\ufeffa\r\nb\rc\n\td\0\x0b\x0c\x1b\x7f\x85\x9fe\ufdd0\ufffe\U0001ffff\ud800f") == "a\nb\nc\n\tdef"
    family, shrug, hindi, persian = "👩\u200d👩\u200d👧", "🤷🏽\u200d♀\ufe0f", "क\u094d\u200dष", "می\u200cخواهم"
    kept = f"{family}{shrug}{hindi}{persian}\u200e\u00ad\u2028\ufffd\ufdef1\U0001fffd\U0010fffd".replace("\ufdef", "")
    assert control(kept) == kept


@settings(deadline=None)
@given(st.text(st.characters()))  # with surrogates
def test_control_gives_valid_utf8_and_is_idempotent(text):
    once = step("control")(text)
    assert step("control")(once) == once
    once.encode()
    for character in once:
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        assert ord(character) % 0x10000 < 0xFFFE and not 0xFDD0 <= ord(character) <= 0xFDEF
    kept = [c for c in text if c not in "\r\n" and c in once]
    assert "".join(kept) == once.replace("\n", "")


# -- length and script


def test_length_takes_its_options():
    assert step("length", min_words=2, max_words=3)("word word") == "word word"
    assert step("length", min_words=2, max_words=3)("word") == Dropped("fewer than 2 words")
    assert step("length", min_words=2, max_words=3)("word " * 4) == Dropped("more than 3 words")


def test_scripts_are_kept_and_dropped():
    japanese, chinese = "これは日本語の文章です", "这是中文文章"
    assert step("script", keep_scripts=("latin", "japanese"))(japanese) == japanese
    assert step("script", keep_scripts=("latin", "japanese"))(chinese) == Dropped("script han")
    assert step("script", drop_scripts=("japanese",))(japanese) == Dropped("script japanese")
    assert step("script", drop_scripts=("japanese",))(PROSE) == PROSE
    assert step("script", keep_scripts=("latin",))("1 2 3") == Dropped("script none")
    assert step("script", keep_scripts=("latin",), drop_scripts=("latin",))(PROSE) == Dropped("script latin")


# -- blocklist


@pytest.fixture
def blocks(tmp_path):
    terms = "\ufeffBad\r\n\nworse  thing\n赌博\nAV女优\nc++\n#nsfw\nStraße\nхуже\n!!!\nक्षमा\nİstanbul"
    blocked = step("blocklist", blocklist=file_of(tmp_path, terms))
    return lambda text: isinstance(blocked(text), Dropped)


FOUND = [
    *(
        "bad",
        "A BAD day",
        "so (bad).",
        "_bad_",
        "bad-tempered",
        "他说bad话",
        "Worse\n thing",
        "网上赌博公司",
        "看av女优",
    ),
    *("in C++, too", "C++", "c++11", "a #NSFW b", "STRASSE", "straße", "Было Хуже.", "wow!!!", "क्षमा करें", "İSTANBUL"),
]
NOT_FOUND = [
    *(
        "",
        "badly",
        "forbad",
        "bad2",
        "bäd",
        "ba\u0301d",
        "bad\u0301",
        "worse",
        "worse and thing",
        "worse things",
        "赌 博",
    ),
    *("赌", "c+", "objc++", "nsfw", "#nsfws", "strassen", "похуже", "!!", "क्षमाएँ", "istanbuls"),
]


@pytest.mark.parametrize("text", FOUND)
def test_terms_are_found(blocks, text):
    assert blocks(text)


@pytest.mark.parametrize("text", NOT_FOUND)
def test_other_words_are_not(blocks, text):
    assert not blocks(text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("aB c", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=5),
    st.text("abC,_ \n", max_size=30),
)
def test_whole_words_are_those_of_a_regular_expression(tmp_path_factory, terms, text):
    path = file_of(tmp_path_factory.getbasetemp(), "\n".join(terms))
    pattern = "|".join(r"\s+".join(map(re.escape, term.split())) for term in terms)
    expected = re.search(f"(?<![a-z])(?:{pattern})(?![a-z])", text, re.IGNORECASE)
    assert isinstance(step("blocklist", blocklist=path)(text), Dropped) == bool(expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("赌博公司", min_size=1, max_size=3), min_size=1, max_size=4), st.text("赌博公司站 a", max_size=12)
)
def test_characters_without_spaces_are_found_anywhere(tmp_path_factory, terms, text):
    path = file_of(tmp_path_factory.getbasetemp(), "\n".join(terms))
    expected = any(term in " ".join(text.split()) for term in terms)
    assert isinstance(step("blocklist", blocklist=path)(text), Dropped) == expected


def test_ten_thousand_terms_are_all_found_and_a_file_without_any_is_refused(tmp_path):
    terms = [f"term{i} of{i % 7}" if i % 2 else f"term{i}" for i in range(10_000)]
    blocked = step("blocklist", blocklist=file_of(tmp_path, "\n".join(terms)))
    assert all(isinstance(blocked(f"{PROSE} {term}."), Dropped) for term in terms[::97])
    assert blocked(PROSE) == PROSE and blocked("term1 of2, term10000") == "term1 of2, term10000"
    with pytest.raises(DataError, match="holds no terms"):
        step("blocklist", blocklist=file_of(tmp_path, "\n \n"))


# -- decontamination

ITEM = "Which of these, in the opinion of the author, is the best way to cross a river?"
WORDS = re.findall(r"\w+", ITEM)


def grams(text):
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(tmp_path):
    clean = step("decontaminate", evaluation=(file_of(tmp_path, f"A paragraph.\n\n{ITEM}\n\n{' '.join(WORDS[:12])}"),))
    dropped = Dropped("13 words of an evaluation")
    for start in range(len(WORDS) - 12):
        assert clean(f"{PROSE}{'; '.join(WORDS[start : start + 13]).upper()} {PROSE}") == dropped
    assert clean(f"{PROSE}{' '.join(WORDS[:12])} {PROSE}") != dropped
    assert clean(" ".join([*WORDS[:6], "other", *WORDS[6:]])) != dropped
    assert clean("") == "" and clean(PROSE) == PROSE


def test_a_file_of_short_items_matches_nothing(tmp_path):
    text = "one two three four five six\n\nseven eight nine ten eleven twelve thirteen fourteen"
    clean = step("decontaminate", evaluation=(file_of(tmp_path, text),))
    assert clean(text) == text and clean(PROSE) == PROSE


def test_chinese_characters_count_as_words(tmp_path):
    clean = step("decontaminate", evaluation=(file_of(tmp_path, "下列哪一项是过河的最好方法？请选择。"),))
    assert isinstance(clean("他问：下列哪一项是过河的最好方法"), Dropped)
    assert clean("他问：哪一项是过河的最好方法") == "他问：哪一项是过河的最好方法"


@settings(max_examples=60, deadline=None)
@given(*[st.lists(st.sampled_from(["a", "b", "C,"]), max_size=40).map(" ".join)] * 2)
def test_shared_grams_are_those_of_plain_sets(tmp_path_factory, known, text):
    clean = step("decontaminate", evaluation=(file_of(tmp_path_factory.getbasetemp(), known),))
    assert isinstance(clean(text), Dropped) == bool(grams(known) & grams(text))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", json.dumps({"id": 1, "question": ITEM, "options": ["a", {"b": "c"}]}) + "\n\n{}\n"),
        ("a.json", json.dumps([{"deep": [[{"x": ITEM}]]}], indent=1)),
        ("a.csv", f'number,question\r\n1,"{ITEM}\nSecond ""line"""\r\n'),
        ("a.tsv", f'label\tsentence\n1\t"{ITEM}\n'),
        ("a.txt", f"\ufeff{ITEM}\n"),
    ],
)
def test_evaluation_files_of_every_kind(tmp_path, name, content):
    path = file_of(tmp_path, content, name)
    assert isinstance(step("decontaminate", evaluation=(path,))(f"x {ITEM} y"), Dropped)
    assert step("decontaminate", evaluation=(path,))(PROSE) == PROSE


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_malformed_evaluation_files_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}(, line 1)? is not JSON"):
        step("decontaminate", evaluation=(file_of(tmp_path, "{no", name),))


def test_real_questions_are_found_in_real_text():
    path = shared("data/lambada/lambada_test.jsonl")
    clean = step("decontaminate", evaluation=(str(path),))
    lines = path.read_text(encoding="utf-8").splitlines()[:50]
    assert all(isinstance(clean(PROSE + json.loads(line)["text"] + PROSE), Dropped) for line in lines)


def test_signatures_are_those_of_duplicates():
    options = CleaningOptions(near_permutations=16, near_threshold=0.5)
    assert cleaning.SIGNATURES["exact"](options)(PROSE) == dedup.exact_signature(PROSE)
    assert (cleaning.SIGNATURES["near"](options)(PROSE) == dedup.near_signature(PROSE, options)).all()
