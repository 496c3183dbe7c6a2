"""Replaces personally identifiable information in text, such as addresses and numbers, by tags such as <EMAIL>.

Each kind has a pattern that matches candidates and a check that decides. False positives lose numbers that the text
needs, so check digits and registered prefixes are verified where a kind has them.
"""

import datetime
import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

# Boundaries of a number: it is not part of a word, a decimal, a longer number in groups, or a price.
_START = r"(?<![0-9A-Za-z_+])(?<![0-9][.-])(?<![$€£¥₹])"
_END = r"(?![0-9A-Za-z_]|[.-][0-9]|\s?[%元])"
_ends = re.compile(_END).match

_NAME = "A-Za-z0-9À-ÖØ-öø-ɏ"  # not \w: Chinese has no space between a word and an address
_EMAIL = re.compile(rf"(?<![{_NAME}._%+-])[{_NAME}._%+-]+@(?:[{_NAME}][{_NAME}-]*+\.)+[A-Za-z]{{2,24}}")

_DOTTED = r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
_IPV4 = re.compile(rf"(?<![0-9A-Za-z_.])(?<!ersion ){_DOTTED}(?![0-9A-Za-z_]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z_.])(?<![0-9A-Fa-f:]:)"
    rf"(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_DOTTED}|[0-9A-Fa-f]{{0,4}})(?![0-9A-Za-z_]|[.:][0-9])"
)

_PROVINCE = "(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|[7-9]1|8[23])"
_ID = re.compile(rf"{_START}{_PROVINCE}[0-9]{{15}}[0-9Xx]{_END}")
_ID_WEIGHTS = [2**place % 11 for place in range(17, -1, -1)]

_CARD = re.compile(
    rf"""{_START}(?:
    [0-9]{{13,19}}
    |[0-9]{{4}}(?P<by>[ -])(?:                                              # as cards print them:
        [0-9]{{4}}(?P=by)[0-9]{{4}}(?P=by)[0-9]{{1,4}}(?:(?P=by)[0-9]{{1,3}})?  # 4-4-4-4 with fewer or more
        |[0-9]{{6}}(?P=by)[0-9]{{4,5}})                                         # 4-6-5
    |[0-9]{{6}}[ -][0-9]{{13}}
    ){_END}""".replace("[ -]", r"[\ -]"),
    re.VERBOSE,
)
# Prefixes and lengths of card issuers. One long number in ten passes the Luhn check by chance; these exclude times in
# milliseconds (1...), ISBNs (978, 979) and most bar codes.
_ISSUERS = re.compile(
    "4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})"  # Visa
    "|(?:5[0-8]|6[0-9])[0-9]{14,17}"  # Mastercard, Maestro, Discover, UnionPay, RuPay
    "|2(?:20[0-4]|22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"  # Mir, Mastercard
    "|3[47][0-9]{13}"  # American Express
    "|3(?:0[0-59]|[689][0-9])[0-9]{11,16}"  # Diners Club
    "|35(?:2[89]|[3-8][0-9])[0-9]{12,15}"  # JCB
)

_PHONE = re.compile(
    rf"""{_START}(?:
    (?:\+(?=[1-9])|00(?=[1-9][0-9]{{0,3}}[\ -]))                 # anywhere: +44 (0)20 7946 0958, 0049 30 123456
        [0-9]+(?:(?:[\ ./-]|\ ?\(|\)[\ .-]?)[0-9]+){{0,7}}
    |(?:1[\ .-])?(?:\([2-9][0-9]{{2}}\)\ ?|[2-9][0-9]{{2}}[\ .-])[2-9][0-9]{{2}}[\ .-][0-9]{{4}}
        (?:\ ?(?:x|ext\.?)\ ?[0-9]{{1,5}})?                      # North America: (555) 234-5678 x9
    |1[3-9][0-9](?P<by>[\ -]?)[0-9]{{4}}(?P=by)[0-9]{{4}}        # China, mobile
    |(?<![0-9]\ )0[1-9](?:[\ .][0-9]{{2}}){{4}}(?!\ [0-9])       # France
    |0[1-9]-[0-9]{{4}}-[0-9]{{4}}                                # Japan
    |0[1-9][0-9]{{1,3}}(?:[\ -][0-9]{{3,4}}){{2}}                # Japan, Britain
    |0[1-9][0-9]{{1,4}}[\ /-][0-9]{{6,8}}                        # China, Germany, Britain
    |\(0[1-9][0-9]{{0,3}}\)\ ?[0-9]{{3,4}}[\ -]?[0-9]{{3,4}}
    ){_END}""",
    re.VERBOSE,
)


def passes_luhn(digits: str) -> bool:
    """Returns True if the last digit is the check digit of ISO/IEC 7812-1, annex B."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_card(text: str) -> bool:
    """Returns True if a number, with spaces or hyphens, has prefix, length and check digit of a payment card."""
    digits = re.sub("[ -]", "", text)
    return _ISSUERS.fullmatch(digits) is not None and passes_luhn(digits)


def is_resident_id(text: str) -> bool:
    """Returns True if 18 characters are a Chinese identity number (GB 11643): birth date and ISO 7064 check digit."""
    try:
        born = datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    values = [10 if digit in "Xx" else int(digit) for digit in text]
    remainder = sum(weight * value for weight, value in zip(_ID_WEIGHTS, values, strict=True)) % 11
    return 1900 <= born.year < 2050 and remainder == 1


def is_ip(text: str) -> bool:
    """Returns True for an IPv4 address, or an IPv6 address that is unlikely to be code.

    Slices such as `1::2` and names such as `dead::beef` are valid IPv6 addresses. Accepted are those with a digit and
    either three groups or a first group of three or four characters.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 4:
        return True
    groups = [group for group in text.split(":") if group]
    return any(map(str.isdigit, text)) and (len(groups) > 2 or len(groups[0]) > 2)


def is_phone(text: str) -> bool:
    """Returns True for a national number, or an international one of 9 to 15 digits (E.164) that is not a decimal."""
    digits = sum(map(str.isdigit, text.removeprefix("00")))
    return not text.startswith(("+", "00")) or (9 <= digits <= 15 and not re.fullmatch(r"\+[0-9]+\.[0-9]+", text))


class PIIKind(NamedTuple):
    """Kind of personal data."""

    tag: str
    prefilter: re.Pattern[str]  # fast pattern that every text with one matches
    pattern: re.Pattern[str]
    check: Callable[[str], bool]


# Strictest first: an identity number can pass for a card number, and either contains phone numbers.
KINDS = (
    PIIKind("<EMAIL>", re.compile("@"), _EMAIL, lambda text: True),
    PIIKind("<IP>", re.compile(":[0-9A-Fa-f]{0,4}:"), _IPV6, is_ip),
    PIIKind("<IP>", re.compile(r"\.[0-9]+\."), _IPV4, is_ip),
    PIIKind("<ID>", re.compile("[0-9][0-9]{16}"), _ID, is_resident_id),
    PIIKind("<CARD>", re.compile("[0-9][0-9]{3}[0-9 -]{9}"), _CARD, is_card),
    PIIKind("<PHONE>", re.compile("[0-9][0-9 ()./-]{7}"), _PHONE, is_phone),
)


def scrub(text: str) -> str:
    """Replaces e-mail and IP addresses, Chinese identity, payment card and phone numbers by their tags.

    The function is idempotent.
    """
    before = ""
    while text != before:  # a tag can expose another match beside it; every round but the last removes digits or an @
        before = text
        for kind in KINDS:
            text = _replace(text, kind)
    return text


def _replace(text: str, kind: PIIKind) -> str:
    if not kind.prefilter.search(text):
        return text
    pieces, done, at = [], 0, 0
    while match := kind.pattern.search(text, at):
        end = _accepted_end(match, kind.check)
        if end:
            pieces += [text[done : match.start()], kind.tag]
            done = at = end
        else:
            at = match.start() + 1  # another match may begin within
    return "".join([*pieces, text[done:]])


def _accepted_end(match: re.Match[str], check: Callable[[str], bool]) -> int:
    """Returns the end of the longest accepted prefix of a candidate, or 0 if there is none.

    A candidate may include groups of digits after it, such as the date of a card; they are removed one by one.
    """
    if check(match[0]):
        return match.end()
    for group in reversed(list(re.finditer("[0-9]+(?=[ :])", match[0]))):
        end = match.start() + group.end()
        if check(match[0][: group.end()]) and _ends(match.string, end):
            return end
    return 0
