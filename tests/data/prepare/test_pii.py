"""Detection of personal data, numbers that are not, and replacement in any context."""

import re
from datetime import date

import pytest
from conftest import shared
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptjax.data.prepare.pii import passes_luhn, scrub

# -- numbers as their issuers make them, and their check digits computed in another way than the code does


def luhn_check_digit(digits):
    table = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    total = sum(table[int(digit)] if i % 2 == 0 else int(digit) for i, digit in enumerate(reversed(digits)))
    return str(-total % 10)


def id_check_digit(digits):
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(digit) for weight, digit in zip(weights, digits, strict=True))
    return "10X98765432"[total % 11]


def digits(count):
    return st.text("0123456789", min_size=count, max_size=count)


ISSUED = [
    *[("4", 13), ("4", 16), ("4", 19), ("51", 16), ("55", 16), ("2221", 16), ("2720", 16), ("34", 15), ("37", 15)],
    *[("6011", 16), ("65", 16), ("62", 16), ("62", 19), ("36", 14), ("3528", 16), ("5018", 18)],
]


@st.composite
def card_numbers(draw, right=True):
    prefix, length = draw(st.sampled_from(ISSUED))
    body = prefix + draw(digits(length - 1 - len(prefix)))
    last = int(luhn_check_digit(body)) + (0 if right else draw(st.integers(1, 9)))
    return body + str(last % 10)


def in_groups(number, by):
    sizes = {15: (4, 6, 5), 14: (4, 6, 4)}.get(len(number), (4, 4, 4, 4, 4))
    groups, at = [], 0
    for size in sizes:
        groups.append(number[at : at + size])
        at += size
    return by.join(group for group in groups if group)


@st.composite
def resident_ids(draw, right=True):
    province = draw(st.sampled_from(["11", "31", "44", "51", "62", "65", "81"]))
    born = draw(st.dates(min_value=date(1900, 1, 1), max_value=date(2049, 12, 31)))
    body = province + draw(digits(4)) + born.strftime("%Y%m%d") + draw(digits(3))
    last = "0123456789X".index(id_check_digit(body)) + (0 if right else draw(st.integers(1, 10)))
    return body + draw(st.sampled_from(["0123456789X", "0123456789x"]))[last % 11]


phones = st.one_of(
    st.builds("+1 ({}) {}-{}".format, digits(3), digits(3), digits(4)),
    st.builds("+44 20 {} {}".format, digits(4), digits(4)),
    st.builds("+49{}".format, digits(10)),
    st.builds("+86-1{}-{}-{}".format, digits(2), digits(4), digits(4)),
    st.builds("0033 {} {} {} {} {}".format, st.sampled_from("1267"), *[digits(2)] * 4),
    st.builds("(2{}) 5{}-{}".format, digits(2), digits(2), digits(4)),
    st.builds("1-8{}-2{}-{}".format, digits(2), digits(2), digits(4)),
    st.builds("9{0}.3{0}.{1}".format, digits(2), digits(4)),
    st.builds("1{}{}{}".format, st.sampled_from("3456789"), digits(9), st.just("")),
    st.builds("13{} {} {}".format, digits(1), digits(4), digits(4)),
    st.builds("010-{}".format, digits(8)),
    st.builds("020 {} {}".format, digits(4), digits(4)),
    st.builds("07{} {}".format, digits(3), digits(6)),
    st.builds("0{} {} {} {} {}".format, st.sampled_from("123456789"), *[digits(2)] * 4),
    st.builds("090-{}-{}".format, digits(4), digits(4)),
    st.builds("030/{}".format, digits(7)),
)
emails = st.from_regex(
    r"[a-z0-9]{1,8}([._+-][a-z0-9]{1,8})?@([a-z0-9]{1,8}(-[a-z0-9]{1,4})?\.){1,2}[a-z]{2,6}", fullmatch=True
)
ipv4 = st.ip_addresses(v=4).map(str)
ipv6 = st.ip_addresses(v=6).flatmap(
    lambda address: st.sampled_from([str(address), address.exploded, str(address).upper()])
)
around = st.sampled_from(
    [
        "{}",
        "call {} now",
        "电话{}，谢谢",
        "({})",
        '"{}"',
        "x: {};",
        "{}.",
        "{}, {}",
        "\n{}\n",
        "<td>{}</td>",
        "12/25, {}",
        "{}\t2024",
    ]
)


@settings(max_examples=150, deadline=None)
@given(around, st.data())
def test_valid_identifiers_are_always_replaced(frame, data):
    for tag, valid in (
        ("<EMAIL>", emails),
        ("<CARD>", card_numbers()),
        ("<CARD>", card_numbers().map(lambda number: in_groups(number, " "))),
        ("<CARD>", card_numbers().map(lambda number: in_groups(number, "-"))),
        ("<ID>", resident_ids()),
        ("<PHONE>", phones),
        ("<IP>", ipv4),
    ):
        one = data.draw(valid)
        assert scrub(frame.format(one, one)) == frame.format(tag, tag), one


@settings(deadline=None)
@given(around, ipv6)
def test_ipv6_addresses_that_are_not_code_are_replaced(frame, address):
    groups = [group for group in address.split(":") if group]
    assume(len(groups) > 2 and re.search("[0-9]", address))
    assert scrub(frame.format(address, address)) == frame.format("<IP>", "<IP>")


@settings(max_examples=150, deadline=None)
@given(around, card_numbers(right=False), resident_ids(right=False))
def test_with_a_wrong_check_digit_they_are_never_replaced(frame, card, identity):
    assert "<CARD>" not in scrub(frame.format(card, card))
    if len(card) <= 16:  # the first 16 of 19 in groups may be right, and the others what is printed beside a number
        for text in (in_groups(card, " "), in_groups(card, "-")):
            assert "<CARD>" not in scrub(frame.format(text, text))
    assert "<ID>" not in scrub(frame.format(identity, identity))


@settings(deadline=None)
@given(st.text(), st.text(alphabet=" .:-()+/_<>ABCDEFabcdefghijz\n你é", max_size=60))
def test_text_without_digits_and_at_signs_stays(anything, likely):
    for text in (anything, likely):
        bare = re.sub("[0-9@]", "", text)
        assert scrub(bare) == bare


pieces = st.one_of(
    st.text(alphabet="0123456789 .:-()+/@x", max_size=12),
    *(emails, ipv4, ipv6, phones, card_numbers(), resident_ids(), st.text(max_size=3)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=8), st.sampled_from(["", " ", "-", ".", "/", ":", ", ", "\n"]))
def test_scrubbing_twice_changes_nothing_more(parts, between):
    once = scrub(between.join(parts))
    assert scrub(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "2023-01-02 and 01/02/2003, 12.05.2004, 1998-2003, 2001 2002 2003 2004, 2024-01-02T03:04:05.678901Z, 12:34:56",
        "$1,234,567.89, €13800138000, 13800138000元, 300 000 000, +10 000 000, 99.99%, 5,105,105,105,105,100",
        "ISBN 978-0-306-40615-7, 9780306406157, 978 7 302 12345 6, 0-306-40615-2, 0306406152, 9790000000001",
        "1700000000, 1700000000000, 1700000000000000, 1700000000000000000, 20230102030405, 12345678901234567890",
        "0.5333333333333333, 3.14159265358979, +1.23456789012, +1.234567890e+05, 1e-5",
        "1.2.3.400, v1.2.3.4, version 1.2.3.4, 1.2.3.4.5, 256.1.1.1, 01.02.03.04, 1.2.3",
        "x[1::2], [::2], a[::-1], dead::beef, std::vector, c1::c2, 00:1A:2B:3C:4D:5E, 10:20:30:40",
        "123e4567-e89b-12d3-a456-426614174000, 4111111111111111a, a4111111111111111, 4111-1111-11111-111",
        "@property, @someone, foo@, foo@localhost, a @ b.com, n=10@5, 5%@home",
        # right check digits; no such day, year, province
        "110105194902300020, 110105184912310020, 110105205012310025, 990105194912310023, 100105194912310028",
        "555-1234, 100-2000, 12-34-56, pages 210-215-2200-2300, 01 02 03 04 05 06 07, 867-5309",
        "0000 0000 0000 0000, 1234 5678 9012 3456, 4111 1111 1111 1112",
    ],
)
def test_ordinary_numbers_stay(text):
    assert scrub(text) == text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("联系我foo@bar.com。电话13800138000，身份证11010519491231002X", "联系我<EMAIL>。电话<PHONE>，身份证<ID>"),
        ("4111 1111 1111 1111 12/25 123", "<CARD> 12/25 123"),
        ("4111 1111 1111 1111 123", "<CARD> 123"),
        ("order 1234 4111 1111 1111 1111", "order 1234 <CARD>"),
        ("7,5105105105105100,2025", "7,<CARD>,2025"),
        ("http://192.168.0.1:8080/x and [2001:db8::8a2e:370:7334]:443", "http://<IP>:8080/x and [<IP>]:443"),
        ("fe80::1: up; ::ffff:10.0.0.1; 10.0.0.0/8; at 12:30 10.0.0.1", "<IP>: up; <IP>; <IP>/8; at 12:30 <IP>"),
        ("mail to José.Núñez@müller-söhne.de, o.k.", "mail to <EMAIL>, o.k."),
        ("+44 (0)20 7946 0958, +1-800-555-0199", "<PHONE>, <PHONE>"),
        ("(555) 234-5678 x12, +44 20 7946 0958 2023 times", "<PHONE>, <PHONE> 2023 times"),
        ("", ""),
    ],
)
def test_examples(text, expected):
    assert scrub(text) == expected


@settings(deadline=None)
@given(st.text("0123456789", min_size=1))
def test_luhn(text):
    assert passes_luhn(text + luhn_check_digit(text))
    assert sum(passes_luhn(text + last) for last in "0123456789") == 1


@pytest.mark.parametrize(
    "hostile", ["1-" * 50_000, "+1 2 " * 20_000, "a." * 50_000 + "@", "1:" * 50_000, "4 " * 50_000]
)
def test_hostile_text_takes_no_longer_than_its_length(hostile):
    once = scrub(hostile)
    assert scrub(once) == once


def test_novels_contain_no_pii():
    for path in sorted(shared("data/english_novels").glob("[A-C]*.txt")):
        text = path.read_text(encoding="utf-8")
        assert scrub(text) == text
