"""Whether a reply contains a text: whole words as words, numbers as numbers.

Both are cut into tokens, and those of the text must follow each other in the reply:

    number   its value counts, not how it is written: 1,200 and 1 200 and 1'200 and $1,200.00 are one number
    word     letters, digits and marks: B12, 007, 5th, 3.11.4, 10:30 and 10² are words, with no numbers in them
    letter   a token of its own in scripts without spaces between words, so that a part of a sentence is found
    sign     everything else but spaces

A number that can be read in two ways is read as in English: 1.200 is a little more than one. Where English has no
reading, another is taken: 1.200,50 and 1.200.000 have thousands, and 2,5 has a decimal comma.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple, TypeAlias


class Number(NamedTuple):
    """A number in a text.

    Attributes:
        value: Its value.
        unit: A currency sign or "%"; empty if there is none.
    """

    value: Fraction
    unit: str


Token: TypeAlias = str | Number

_LONGEST = 300  # characters of a number: Python refuses to read thousands of digits
_CURRENCY = "[$¢£¥฿₦₩₪₫€₱₴₸₹₺₽₿]"
_UNITS = {
    "percent": "%", "dollar": "$", "dollars": "$", "usd": "$", "euro": "€", "euros": "€", "eur": "€", "gbp": "£",
    "yen": "¥", "rupees": "₹",
}  # fmt: skip
_TIMES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Thai, Lao, Burmese, Khmer, kana and Chinese have no spaces between words; Korean writes particles onto its words
_UNSPACED = (
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
# \w lacks the vowel signs of Indian scripts, and accents that no letter includes
_MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
_WORD = rf"(?:(?!{_UNSPACED})(?:[^\W_]|[{_MARKS}]))"  # one character of a word
_LETTER = rf"(?:(?!\d){_WORD})"

# These are read in this order, in verbose patterns. None begins behind "\d,": 1,200,5 is a list.
_GROUPED = r"""
    (?! \d{3}[ ] )  # 112 152 193 is a list
    [1-9]\d{0,2} (?P<mark> [,'_ ] ) \d{3} (?: (?P=mark) \d{3} )* (?: (?! (?P=mark) ) [.,]\d+ )?
    | [1-9]\d{0,2} (?: (?: \.\d{3} )+ ,\d{1,2} | (?: \.\d{3} ){2,} )
    | [1-9]\d? (?: ,\d\d )+ ,\d{3} (?: \.\d+ )?  # lakhs: 12,34,567
"""
_DECIMAL_COMMA = r"0,\d+ | [1-9]\d*,(?: \d{1,2} | \d{4,} )"
_PLAIN = rf"(?: 0 | [1-9]\d* ) (?: \.\d+ )? (?: e[-+]?\d\d? )? | (?<! {_WORD} ) (?<! \. ) \.\d+"
_FRACTION = r"(?<! / ) (?: \d{1,3}[ ] )? \d+ / [1-9]\d* (?! / | ,\d )"  # 1/2 and 2 1/2, but not a part of 1/2/2024

_TOKEN = re.compile(
    rf"""
    (?P<clock> \d\d? (?: :\d\d ){{1,2}} (?! :?{_WORD} ) )
    | (?P<power> \d+ (?: \.\d+ )? \^ \{{?[-+]?\d+\}}? )
    | (?P<number>
        # a hyphen behind a word, a number or a bracket is no sign: A-5, 3-5, (3)-5
        (?: (?<! {_WORD} ) (?<! [)\]}}%°.+-] ) (?P<sign> [-+] ) )?
        (?: (?P<currency> {_CURRENCY} ) [ ]? (?P<inner_sign> [-+] )? )?
        (?:
            (?P<fraction> {_FRACTION} )
            | (?<! \d, ) (?P<grouped> {_GROUPED} ) (?! [,']\d )
            | (?<! \d, ) (?P<comma> {_DECIMAL_COMMA} ) (?! ,\d )
            | (?P<plain> {_PLAIN} )
        )
        (?! {_WORD} | \.\d | (?: [.,]\d+ ){{1,9}} {_LETTER} )
        (?: [ ] (?P<times> {"|".join(_TIMES)} ) (?! {_WORD} ) )?
        (?:
            [ ]? (?P<unit> % | {_CURRENCY} ) (?! [ ]?\d )
            | (?= [ ] (?P<unit_word> {"|".join(_UNITS)} ) (?! {_WORD} ) )
        )?
    )
    | \d+ (?: [.,]\d+ )* {_WORD}* (?: \.\d{_WORD}* )*  # digits that are not a number
    | {_WORD}+ (?: _+ {_WORD}+ )*
    | \S
    """,
    re.VERBOSE,
)


def contains(reply: str, text: str) -> bool:
    """Return whether a reply contains a text, in capitals or not.

    Quotation marks around the text, the full stop at its end, and the unit of a number there need not be in the reply.
    An empty text is in no reply.
    """
    pattern, sequence = _essence(tokens(text)), tokens(reply)
    starts = range(len(sequence) - len(pattern) + 1) if pattern else range(0)
    return any(all(map(_same, pattern, sequence[i : i + len(pattern)])) for i in starts)


def tokens(text: str) -> list[Token]:
    """Return the tokens of a text: numbers by their values, everything else folded."""
    return [_token(match) for match in _TOKEN.finditer(fold(text))]


def _token(match: re.Match[str]) -> Token:
    text = match[0]
    if match["clock"]:
        return text.removeprefix("0")
    if match["power"]:
        return re.sub("[{}+]", "", text)
    if not match["number"] or len(text) > _LONGEST:
        return text
    sign = -1 if "-" in (match["sign"], match["inner_sign"]) else 1
    unit = match["unit"] or match["currency"] or _UNITS.get(match["unit_word"], "")
    return Number(sign * _value(match) * _TIMES.get(match["times"], 1), unit)


def _value(match: re.Match[str]) -> Fraction:
    if match["fraction"]:
        return sum(map(Fraction, match["fraction"].split()), Fraction(0))
    digits: str = match["grouped"] or match["comma"] or match["plain"]
    if match["grouped"]:
        digits = digits.replace(re.sub(r"\d", "", digits)[0], "")
    return Fraction(digits.replace(",", "."))


def _same(a: Token, b: Token) -> bool:
    """Return whether tokens are equal; a unit that one of two numbers lacks does not count."""
    if isinstance(a, Number) and isinstance(b, Number):
        return a.value == b.value and (a.unit == b.unit or not (a.unit and b.unit))
    return a == b


def _essence(pattern: list[Token]) -> list[Token]:
    """Return what must be in a reply: the text without the marks of a sentence, and without a last number's unit."""
    start, end = 0, len(pattern)
    while start < end and pattern[start] in ('"', "'", "¿", "¡"):
        start += 1
    while start < end and pattern[end - 1] in ('"', "'", ".", ",", ";", ":", "!", "?", "。", "、"):
        end -= 1
    if end - start > 1 and isinstance(pattern[end - 2], Number) and pattern[end - 1] in _UNITS:
        end -= 1
    return pattern[start:end] or pattern


# characters that NFKC does not make equal
_QUOTES = "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u2039\u203a\u301d\u301e"
_APOSTROPHES = "\u2018\u2019\u201a\u201b\u2032`\u00b4\u02b9\u02bb\u02bc\u02bd"
_HYPHENS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # U+2212 is the minus sign
_EQUAL = str.maketrans(
    dict.fromkeys(_QUOTES, '"')
    | dict.fromkeys(_APOSTROPHES, "'")
    | dict.fromkeys(_HYPHENS, "-")
    | {"\u066b": ".", "\u066c": ",", "\u066a": "%"}  # with Arabic digits
    | {"\u2044": "/", "\u2215": "/", "\u0131": "i"}  # two slashes, and the i without a dot
)
# NFKC would make 21/2 of 2½, 102 of 10² and 10₂, and plain spaces of those that stand in numbers
_APART = (
    (re.compile("([\u00bc-\u00be\u2150-\u215f\u2189\u2460-\u249b\u24ea\u3251-\u325f\u32b1-\u32bf])"), r" \1 "),
    (re.compile("(?<=[0-9])(?=[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b])"), "^"),
    (re.compile("(?<=[0-9])(?=[\u2080-\u2089])"), "_"),
    (re.compile(r"(?<=[0-9])(?:[\u00a0\u2007\u2009\u202f]|\\,|\{,\})(?=[0-9]{3}(?![0-9]))"), "_"),  # LaTeX's, too
)
_MEASURE = "[kcm]m|[km]g|ml|lbs?|ft|k?wh|kw|mph|[gm]b|[gmk]?hz|[ap]m|ms"
_SPELLINGS = (
    (re.compile(r"\bper cent\b"), "percent"),
    (re.compile(rf"(?<![\d%)] )\b(?:minus|negative) (?={_CURRENCY}?\.?\d)"), "-"),
    (re.compile(rf"(= ?)- (?={_CURRENCY}?\.?\d)"), r"\1-"),
    (re.compile(rf"(?<=\d)(?=(?:{_MEASURE})(?!{_WORD}))"), " "),  # 20km
    (re.compile(r"(?<![\w.,])(\d\d?)\.(\d\d?)\.(\d{4})(?!\w|[.,]\d)"), r"\1 . \2 . \3"),  # a date
)


def fold(text: str) -> str:
    """Return a text in lower case, with one way to write each character, and with plain quotes, hyphens and digits."""
    text = "".join(map(_plain, text)).translate(_EQUAL)
    for pattern, replacement in _APART:
        text = pattern.sub(replacement, text)
    # a compatibility caseless match: the Unicode Standard, 3.13, D146
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", text).casefold())
    text = unicodedata.normalize("NFKC", text.casefold()).replace("i\u0307", "i").translate(_EQUAL)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _plain(character: str) -> str:
    """Return a digit of any script in ASCII, and nothing for a character that is not seen."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    is_unseen = unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
    return "" if is_unseen else character
