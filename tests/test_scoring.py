# ruff: noqa: RUF001
"""What a reply contains: numbers by value, words as wholes, and no other difference than a reader would see."""

import random
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyps.data.example import Example, ExampleBranch
from pyps.data.scoring import Number, contains, fold, tokens

# the text, replies that contain it, and replies that do not
NUMBERS: list[tuple[str, list[str], list[str]]] = [
    # thousands
    ("2,125", ["It is 2125.", "2 125", "2'125", "2’125", "2_125", "2\u202f125", "2\u00a0125", "2\u2009125"],
     ["2, 125", "2,1250", "2\n125"]),
    ("1200", ["It is $1,200.", "1,200.00", "\\boxed{1{,}200}", "1\\,200", "**1,200**", "1200,-"], ["1,2,00", "11,200"]),
    ("112", ["112 152 193", "112, 152", "112\n152"], ["112,152", "112\u00a0152", "112'152"]),
    ("112,152", ["112\u00a0152", "112'152", "112_152", "112\\,152"], ["112 152 193", "112, 152"]),
    ("500", ["500,", "1, 500", "(500)"], ["It is 1,500.", "1 500", "1'500", "500,000", "1.500,00", "2,500.5"]),
    ("1", ["1, 200", "1,2,3", "1;200"], ["1,200", "1 200", "1,200,000", "1.200.000", "1,200th"]),
    ("1234567", ["1,234,567", "12,34,567", "1 234 567", "1.234.567", "1.234.567,00"], ["1,234,56", "1.234.56"]),
    ("1200.5", ["1.200,50", "1,200.50", "1 200,5", "1'200.50"], ["1.200", "1,2005", "1.2005"]),
    ("1.200", ["1.2", "1.20"], ["1200", "1,200"]),
    ("3", ["1,2,3", "1,2, 3", "3,"], ["1,23", "0,3", "12,345", "1,2.3"]),
    ("5 million", ["5,000,000", "5000000", "5 million people", "5.0 million"], ["5", "5 billion", "500,000"]),
    ("2500", ["2.5 thousand", "2.5 Thousand people"], ["2.5", "2.5 thousandths"]),
    # decimals
    ("5", ["It is 5.", "5.0", "5.00", "+5", "5,", "is:5", "=5", "it.5 of"], ["It is 2.5.", "0.5", ".5", "5.5", "55"]),
    ("2.5", ["2.50", "2.500", "2,5", "2½", "2 1/2", "5/2", "It is 2.5.", "٢٫٥", "２．５"], ["12.5", "2.55", "2.5.1"]),
    ("0.5", [".5", "0,5", "½", "1/2", "0.50", "50/100"], ["5", "0.05", "1.5", "1/2/2024"]),
    ("0", ["0", "0.0", "-0"], ["10", "0.5", "100", "007"]),
    ("100000", ["1e5", "100,000", "1.0e5"], ["10", "1e6", "10,0000"]),
    # signs
    ("-5", ["It is -5.", "−5", "–5", "-5.0", "minus 5", "negative 5", "x = −5", "= - 5", "(-5)", "-$5", "$-5"],
     ["5", "A-5", "3-5", "3–5", "3−5", "10 minus 5", "- 5 apples", "(3)-5", "--5", "COVID-5"]),
    ("5", ["A-5", "3-5", "3–5", "10 minus 5", "- 5", "x-5", "10 - 5", "+5", "answer—5"],
     ["It is -5.", "−5", "minus 5", "negative 5", "-5.0", "–5"]),
    ("-1200", ["-1,200", "−$1,200.00", "minus 1 200"], ["1,200", "5-1,200"]),
    # units
    ("$1,200", ["1200", "1,200 dollars", "USD 1200", "US$1200", "\\$1,200", "$ 1200"],
     ["€1,200", "1200 euros", "1200%"]),
    ("50%", ["50 %", "50", "50 percent", "50 per cent", "50.0%", "٥٠٪"], ["$50", "0.5", "150%"]),
    ("50", ["50%", "$50", "50 €", "50€", "€50", "50 dollars", "50km", "50 km"], ["a50", "50th", "50.5%", "150 €"]),
    ("5 dollars", ["$5", "5 dollars", "5.00 dollars", "5"], ["5 euros", "€5", "15 dollars", "5%"]),
    ("20 km", ["20km", "20 km", "20 KM", "20.0 km"], ["20", "20 m", "120km"]),
    ("5", ["17 % 5 = 2"], ["$0.5", "17.5 % 2"]),
    # words with digits, and digits that are no numbers
    ("12", ["12", "B-12", "12-year-old"],
     ["B12", "12th", "12b", "x12", "v12.1", "12:30", "1.12.3", "012", "12²", "12^3"]),
    ("B12", ["Vitamin B12.", "b12", "B12-rich"], ["B 12", "12", "B123", "AB12"]),
    ("007", ["Agent 007."], ["7", "07", "0007"]),
    ("3.11", ["Python 3.11.", "3.11,"], ["3.11.4", "13.11", "1.3.11"]),
    ("3.11.4", ["Python 3.11.4.", "3.11.4"], ["3.11", "3.11.41", "3.11.4.1"]),
    ("102", ["102."], ["10²", "10^2", "10₂", "1,02"]),
    ("21", ["21"], ["2½", "2①", "2⁄1"]),
    ("10:30", ["at 10:30.", "10:30am", "10:30 a.m."], ["10", "30", "10:300", "10:30:15", "110:30"]),
    ("9:05", ["09:05", "9:05."], ["9", "5", "19:05"]),
    ("2024", ["12/05/2024", "12.05.2024", "2024-05-12", "May 2024."], ["20245", "2,024.5", "2024.5"]),
    ("2,024", ["2024"], ["2,0245"]),
    ("24", ["24, 7"], ["24/7", "24:07"]),
    ("5", ["10/2 = 5", "10/2", "1,200/5", "5/1,200"], ["5/6", "1/5", "5 1/2"]),
    ("1000", ["1,000/3"], ["1/1000"]),
    ("1" * 5000, ["1" * 5000], ["1" * 4999, "1"]),
]  # fmt: skip

WORDS: list[tuple[str, list[str], list[str]]] = [
    ("Oslo", ["oslo", "OSLO!", "_Oslo_", "**Oslo**", "Oslo's", "（Ｏｓｌｏ）", "Os\u00adlo", "Oslo\u200b"],
     ["Osloites", "Os lo"]),
    ("Ann.", ["It was Ann", "ann's dog", "Ann, of course"], ["Anna.", "Joann."]),
    ('"Yes"', ["Yes, they do.", "“yes”", "«Yes»"], ["Yesterday"]),
    ("don't", ["I don’t", "I don't", "DON`T", "donʼt"], ["dont", "do not", "don"]),
    ("New York", ["New\nYork", "new  york", "New\u00a0York"], ["Newyork", "York", "New, York"]),
    ("Jean-Paul", ["Jean‑Paul", "Jean–Paul", "JEAN-PAUL"], ["Jean Paul", "Paul"]),
    ("Straße", ["STRASSE", "strasse", "Straße."], ["Strassen", "Strase"]),
    ("café", ["cafe\u0301", "CAFÉ", "CAFE\u0301"], ["cafe", "cafés"]),
    ("İstanbul", ["istanbul", "ISTANBUL", "İSTANBUL", "ıstanbul"], ["stanbul"]),
    ("ΟΔΟΣ", ["οδος", "οδοσ"], ["οδο"]),
    ("ﬁne", ["fine", "FINE"], ["finer"]),
    ("H₂O", ["H2O", "h₂o"], ["H2", "2"]),
    ("C++", ["I like C++.", "c++"], ["C", "C+"]),
    ("snake_case", ["`snake_case`", "SNAKE_CASE"], ["case", "snake case"]),
    ("case", ["a case"], ["snake_case", "cases"]),
    ("東京", ["答えは東京です。", "東京都", "東 京"], ["京東", "東"]),
    ("北京", ["首都是北京。", "在北京市"], ["南京", "北"]),
    ("กรุงเทพ", ["เมืองหลวงคือกรุงเทพมหานคร"], ["กรุง"]),
    ("서울", ["정답은 서울입니다.", "서울은"], ["부산"]),
    ("カ", ["ｶ", "カ"], ["ガ"]),
    ("5", ["5個", "答案是5。", "第3-5章", "५", "⑤"], ["温度-5度", "25個", "答案是2.5。"]),
    ("-5", ["温度-5度", "温度は−5度"], ["第3-5章"]),
    ("हिन्दी", ["यह हिन्दी है।"], ["हिन्द", "हिन्दीभाषी"]),
    ("हिन्द", ["हिन्द।"], ["हिन्दी"]),
    ("كتاب", ["هذا كتاب."], ["كتابي"]),
    ("", [], ["", "Oslo."]),
    (" \u200b", [], [" \u200b", "Oslo."]),
    ("?", ["What?"], ["What"]),
    ("...", ["Well…"], ["Well."]),
]  # fmt: skip

CASES = [
    (text, reply, right)
    for text, replies, others in NUMBERS + WORDS
    for right, several in ((True, replies), (False, others))
    for reply in several
]


@pytest.mark.parametrize(("text", "reply", "right"), CASES)
def test_the_table(text: str, reply: str, right: bool) -> None:
    assert contains(reply, text) is right, (tokens(reply), tokens(text))
    assert contains(reply, reply) is bool(tokens(reply))


def test_all_answers_must_be_there_and_no_wrong_one() -> None:
    e = Example(task="t", branches=[ExampleBranch()], answer=["1,200", "Oslo"], wrong=["1,300"])
    assert e.is_right("Oslo has $1200.00.")
    assert not e.is_right("Oslo has 1.200.")
    assert not e.is_right("Oslo has 1200 or 1300.")
    assert e.is_right("Oslo has 1200, and no 11,300.")


# texts as they come, and texts that are full of what looks like numbers
TEXTS = st.text() | st.text("0123456789,.'-+−/ %$€½²₂_:eminusB元กéİı\u0301\u200b{}^\\\n")


@given(TEXTS)
@example("2½")
@example("١٢٬٣٤٥")
@example("\ud800")
def test_a_text_contains_itself(text: str) -> None:
    assert contains(text, text) is bool(tokens(text))
    assert contains(f"{text}\n\nSo.", text) is bool(tokens(text))


@given(TEXTS)
@example("İı")
@example("ΐ\u0345ς")
@example("10²5")
def test_case_and_normalisation_do_not_matter(text: str) -> None:
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, text)
        assert fold(other) == fold(text)
    assert fold(text.casefold()) == fold(text)
    assert fold(text.upper()) == fold(text)


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 3),
    st.sampled_from(["{}", "It is {}.", "x = {}", "**{}**", "是{}。"]),
)
def test_a_number_equals_itself_however_it_is_written(number: int, places: int, frame: str) -> None:
    plain = f"{number}.{'0' * places}".rstrip(".")
    groups = f"{number:,}"
    for written in (plain, groups, *(groups.replace(",", mark) for mark in "_'’\u00a0\u202f\u2009"),
                    plain.replace("-", "−"), f"{groups}.00", f"${groups}", f"{groups}%"):  # fmt: skip
        assert contains(frame.format(written), str(number))
        assert not contains(frame.format(written), str(number + 1))
        assert not contains(frame.format(written), str(-number)) or not number
        assert not contains(frame.format(written), f"{number}.5")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-1000, max_value=1000))
def test_no_part_of_a_number_is_found(value: object) -> None:
    assert [t for t in tokens(f"It is {value}.") if isinstance(t, Number)] == tokens(str(value))


def test_long_replies_take_no_long_time() -> None:
    rng = random.Random(0)
    for alphabet in (
        "1,",
        "1 ",
        "1.",
        "12,. ",
        "0",
        "-1",
        "a1",
        "1/",
        "1'2,",
        "5 million ",
        "e1",
        "(1",
        "ก",
        "½",
        "1:0",
    ):
        reply = "".join(rng.choice(alphabet) for _ in range(20_000))
        contains(reply, reply[:200])
        contains(alphabet * 5_000, "7")
