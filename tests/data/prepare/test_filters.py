"""Gopher's rules against plain computations of the same, just inside and just outside of every threshold; scripts."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.prepare import filters
from gptjax.data.prepare.filters import TextParts

CHINESE = "今天的天气很好，我们去公园散步。他说：“你好吗？”她……没有回答。"


def unique(count, length=5):
    """So many words of that length, each once."""
    return [f"{i:x}".rjust(length, "g") for i in range(count)]


def reasons(rules, text):
    return list(filters.failed_rules(rules, text))


# -- words


@settings(deadline=None)
@given(st.text())
def test_words_of_scripts_with_spaces_are_what_stands_between_spaces(text):
    if not filters.has_unspaced(text):
        assert filters.words(text) == text.split()
    assert "".join(filters.words(text)) == "".join(text.split())


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F)))
def test_tokens_are_lower_case_and_without_punctuation(text):
    assert filters.tokens(text) == re.findall(r"[^\W_]+", text.lower())


def test_characters_are_words_in_scripts_without_spaces():
    assert filters.words("“你好”，世界 and more!") == ["“你", "好”，", "世", "界", "and", "more!"]
    assert filters.tokens("“你好”，World-Wide 世界2") == ["你", "好", "world", "wide", "世", "界", "2"]
    assert filters.words("カタカナ・ひらがな") == ["カ", "タ", "カ", "ナ・", "ひ", "ら", "が", "な"]
    assert filters.words("ที่นี่") == ["ที่", "นี่"]  # Thai marks stay with their letter
    assert filters.words("안녕 하세요") == ["안녕", "하세요"]  # Korean has spaces
    assert filters.words("𠀀𠀁") == ["𠀀", "𠀁"]  # beyond the first plane


# -- n-grams, lines and paragraphs against plain loops


def top_reference(words, n):
    places = {}
    for i in range(len(words) - n + 1):
        places.setdefault(tuple(words[i : i + n]), []).append(i)
    maximum = max(map(len, places.values()), default=0)
    if maximum < 2:
        return 0.0
    covered = [{i + j for i in starts for j in range(n)} for starts in places.values() if len(starts) == maximum]
    return max(sum(len(words[i]) for i in one) for one in covered) / sum(map(len, words))


def duplicate_reference(words, n):
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        covered |= set(range(i, i + n)) if gram in seen else set()
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / max(sum(map(len, words)), 1)


def pieces_reference(pieces):
    seen, again = set(), []
    for piece in pieces:
        (again.append if piece in seen else seen.add)(piece)
    share = len(again) / len(pieces) if pieces else 0.0
    return share, sum(map(len, again)) / max(sum(map(len, pieces)), 1)


few = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee"]), max_size=80)
many = st.lists(st.sampled_from(unique(30, 2) + unique(30, 7)), max_size=300)


@settings(max_examples=200, deadline=None)
@given(few | many, st.integers(0, 60), st.integers(0, 60))
def test_ngram_fractions_are_those_of_plain_loops(words, start, end):
    words = words + words[start:end]
    parts = TextParts(" ".join(words))
    for n in filters.TOP_NGRAMS:
        assert filters.top_ngram_characters(parts, n) == pytest.approx(top_reference(words, n), abs=1e-12)
    for n in filters.DUPLICATE_NGRAMS:
        assert filters.duplicate_ngram_characters(parts, n) == pytest.approx(duplicate_reference(words, n), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", " ", "one", " one\t", "two words", "three of them"])))
def test_fractions_of_lines_and_paragraphs_are_those_of_plain_loops(lines):
    text = "\n".join(lines)
    parts = TextParts(text)
    assert parts.lines == [line.strip() for line in lines if line.strip()]
    paragraphs, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line)
        elif current:
            paragraphs.append("\n".join(current).strip())
            current = []
    assert parts.paragraphs == paragraphs
    for pieces in (parts.lines, parts.paragraphs):
        share, characters = pieces_reference(pieces)
        assert filters.duplicate_fraction(pieces) == pytest.approx(share)
        assert filters.duplicate_characters(pieces) == pytest.approx(characters)


# -- thresholds: what lies on them stays


def grams_text(n, times, total=1000):
    """An n-gram so many times, with words between that are there once."""
    fill, gram = iter(unique(total)), [f"x{i:04}" for i in range(n)]
    words = [word for _ in range(times) for word in (*gram, next(fill))]
    return " ".join([*words, *(next(fill) for _ in range(total - len(words)))])


TOP = [(2, 100), (3, 60), (4, 40)]
DUPLICATE = [(5, 30), (6, 23), (7, 18), (8, 15), (9, 12), (10, 10)]


@pytest.mark.parametrize("n, times", TOP)
def test_top_ngrams_up_to_the_threshold(n, times):
    reason = f"more than {filters.TOP_NGRAMS[n]:.0%} of characters in the top {n}-gram"
    assert reason not in reasons(filters.REPETITION, grams_text(n, times))
    assert reason in reasons(filters.REPETITION, grams_text(n, times + 1))


@pytest.mark.parametrize("n, times", DUPLICATE)
def test_duplicate_ngrams_up_to_the_threshold(n, times):
    reason = f"more than {filters.DUPLICATE_NGRAMS[n]:.0%} of characters in duplicate {n}-grams"
    assert reason not in reasons(filters.REPETITION, grams_text(n, times + 1))  # the first is no duplicate
    assert reason in reasons(filters.REPETITION, grams_text(n, times + 2))


def pieces_text(size, again, between):
    """So many pieces of which some are as one before, the same length each."""
    return between.join(unique(size - again, 20) + ["g" * 19 + "0"] * again)


def long_pieces_text(again, between):
    """100 characters, `again` of them in the second of two equal pieces, the rest in many short ones."""
    return between.join(["x" * again] * 2 + unique((100 - 2 * again) // 2, 2))


@pytest.mark.parametrize("what, between", [("line", "\n"), ("paragraph", "\n \n")])
def test_duplicate_lines_and_paragraphs_up_to_the_thresholds(what, between):
    share, characters = f"more than 30% duplicate {what}s", f"more than 20% of characters in duplicate {what}s"
    assert share not in reasons(filters.REPETITION, pieces_text(10, 3, between))
    assert share in reasons(filters.REPETITION, pieces_text(10, 4, between))
    assert characters not in reasons(filters.REPETITION, long_pieces_text(20, between))
    assert characters in reasons(filters.REPETITION, long_pieces_text(21, between))


def lines_of(marked, total, line, marked_line):
    return "\n".join([marked_line] * marked + [line] * (total - marked))


@pytest.mark.parametrize(
    "reason, kept, dropped",
    [
        ("more than 0.1 hash signs a word", "word " * 100 + "#" * 10, "word " * 99 + "word" + "#" * 11),
        ("more than 0.1 ellipses a word", "word " * 89 + "on... on… " * 5 + "word", "word " * 89 + "on... on…… " * 4),
        (
            "more than 90% of lines start with a bullet",
            lines_of(9, 10, "a line", " • point"),
            lines_of(10, 10, "", "- point"),
        ),
        (
            "more than 30% of lines end with an ellipsis",
            lines_of(3, 10, "a line.", "and so..."),
            lines_of(4, 10, "a line.", "and so… "),
        ),
        ("fewer than 80% of words have a letter", "3.1 " * 20 + "'tis " * 80, "3.1 " * 21 + "'tis " * 79),
        ("fewer than 2 English stop words", "He went With them to town", "He went there to go to town"),
    ],
)
def test_quality_up_to_the_thresholds(reason, kept, dropped):
    assert reason not in reasons(filters.QUALITY, kept)
    assert reason in reasons(filters.QUALITY, dropped)


@pytest.mark.parametrize(
    "reason, kept, dropped",
    [
        ("fewer than 50 words", "word " * 50, "word " * 49),
        ("fewer than 50 words", "字" * 50, "字" * 49),
        ("more than 60 words", "word " * 60, "word " * 61),
        ("mean word length below 3", "ab abcd " * 25, "ab abcd " * 25 + "ab"),
        ("mean word length above 10", "a" * 9 + " " + "a" * 11, "a" * 10 + " " + "a" * 11),
    ],
)
def test_length_up_to_the_thresholds(reason, kept, dropped):
    rules = filters.length_rules(50, 60)
    assert reason not in reasons(rules, kept)
    assert reason in reasons(rules, dropped)


def test_dashes_of_dialogue_are_not_bullets():
    assert filters.bullet_fraction(TextParts("— Bonjour, dit-il.\n— Bonjour.\n")) == 0
    assert filters.bullet_fraction(TextParts("* a\n\n- b\n\t● c\nd")) == 0.75


def test_rules_made_for_english_leave_other_scripts_alone():
    for text in (CHINESE * 10, "Он сказал, что придёт завтра утром. " * 2, "ที่นี่อากาศดี " * 30):
        assert reasons(filters.length_rules(5, 10_000), text) == []
        assert reasons(filters.QUALITY, text) == []
    assert reasons(filters.QUALITY, "Er sagte, dass er morgen kommt.") == ["fewer than 2 English stop words"]


def test_repetition_is_seen_in_chinese():
    assert any("2-gram" in reason for reason in reasons(filters.REPETITION, "买买买买买买" * 10))
    assert reasons(filters.REPETITION, CHINESE) == []


def test_no_document_is_too_small_to_measure():
    for text in ("", " ", "\n\n", "one", "one two", "#", "字", "\u0301"):
        for rule in (*filters.length_rules(0, 10), *filters.QUALITY, *filters.REPETITION):
            assert isinstance(rule.measure(TextParts(text)), float | int)
    assert reasons(filters.length_rules(1, 10), "") == ["fewer than 1 words"]
    assert reasons(filters.REPETITION, "") == []
    assert reasons(filters.QUALITY, "") == ["fewer than 2 English stop words"]
    assert math.isnan(filters.mean_word_length(TextParts("")))


def test_a_document_may_be_large():
    text = grams_text(10, 1000, 200_000)
    assert filters.duplicate_ngram_characters(TextParts(text), 10) == pytest.approx(9990 / 200_000)


# -- scripts


@pytest.mark.parametrize(
    "script, text",
    [
        ("latin", "Ça va? Österreich naïve ﬁne ＷＩＤＥ"),
        ("cyrillic", "Привет, world, как дела"),
        ("greek", "Καλημέρα κόσμε"),
        ("arabic", "مرحبا بالعالم"),
        ("hebrew", "שלום עולם"),
        ("devanagari", "नमस्ते दुनिया"),
        ("thai", "สวัสดีชาวโลก"),
        ("han", CHINESE),
        ("han", "这是一个很长的中文句子里面只有一个の字而已没有别的假名了"),
        ("japanese", "東京都知事選挙の結果は"),
        ("japanese", "ｶﾀｶﾅﾉﾃｷｽﾄ"),
        ("korean", "안녕하세요 世界"),
        ("other", "ᚠᚢᚦᚨᚱᚲ"),
        ("none", "1234 + 5678 = ? 😀"),
        ("none", ""),
    ],
)
def test_the_dominant_script(script, text):
    assert filters.dominant_script(text) == script
    assert script in filters.SCRIPTS


@settings(deadline=None)
@given(st.text())
def test_every_text_has_one_of_the_scripts(text):
    assert filters.dominant_script(text) in filters.SCRIPTS
    assert (filters.dominant_script(text) == "none") == (not any(map(str.isalpha, text)))
