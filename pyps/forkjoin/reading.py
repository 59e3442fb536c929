"""What of the joined outputs a synthesizer reads again.

Joined keys and values were computed without the other branches, and an ordinary model, without an adapter made for it,
hardly reads them. It does once it has computed some of the tokens again itself, in sight of everything before them: the
heads of the outputs, and the places where words of the question stand (docs/reading.md). Choosers give every token a
score; the best are read again, within a budget.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyps.engine.join import LayerCorrection
from pyps.engine.model import Model
from pyps.errors import InputError

Scores = list[NDArray[np.floating]]  # of each output: a score for each token; 0 for those that need not be read again
Choice = list[NDArray[np.bool_]]  # of each output: which tokens are read again

HEAD = 4  # tokens at the beginning of an output
_AROUND = 4  # tokens on either side of a word
_FIRST = 1e3  # a score above all words

# Latin-1's signs, general punctuation, CJK punctuation, and full-width punctuation, in UTF-8
_SIGN = rb"\xc2[\xa0-\xbf]|\xe2[\x80\x81][\x80-\xbf]|\xe3\x80[\x80-\xbf]|\xef\xbc[\x80-\x8f]"
_WORD = re.compile(rb"(?:\w|(?!" + _SIGN + rb")[\xc2-\xf4][\x80-\xbf]+)+")
_SENTENCE_END = re.compile(rb"(?:[.!?]+(?=\s|$)|\xe3\x80\x82|\n)\s*")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How outputs are laid out for a synthesizer, what is done to them, and how much of them it reads again.

    Attributes:
        share: Most of the outputs' tokens that are read again, 0 to 1.
        labels: Whether the synthesizer reads a line with its branch's name before each output, as text synthesis does.
            Outputs then stand one after the other.
        correction: What every layer of the joined cells goes through; empty for none.
        auto: Whether the share was found, and not asked for: all is read again where that is about as fast.
        why: Why it is this share, for people.
    """

    share: float = 0.0
    labels: bool = False
    correction: tuple[LayerCorrection, ...] = field(default=(), repr=False, compare=False)
    auto: bool = False
    why: str = "as asked for"

    @property
    def joins_only(self) -> bool:
        """Whether nothing is read again: outputs are joined as they are."""
        return not (self.share or self.labels or self.correction)

    def describe(self) -> str:
        """Return the share and the reason, for people."""
        return f"{self.share:.0%}, {self.why}"


JOIN_ONLY = Reading()  # nothing is read again

Read = float | Literal["auto"]


def check_read(read: object) -> None:
    """Raise InputError if this is neither a share of tokens, 0 to 1, nor "auto"."""
    number = isinstance(read, (int, float)) and not isinstance(read, bool)
    if read != "auto" and not (number and 0 <= read <= 1):  # type: ignore[operator]
        raise InputError(f"read must be a number between 0 and 1, or 'auto', not {read!r}")


@dataclass(frozen=True, kw_only=True)
class Again:
    """What a synthesizer computes itself before its prompt, and what is done to the rest.

    Attributes:
        labels: The tokens of a line before each output; empty for none.
        choice: Which tokens of each output it reads again.
        correction: What every layer of the joined ones goes through; empty for none.
        why: Why it is so much, for people.
    """

    labels: Sequence[Sequence[int]] = ()
    choice: Choice
    correction: Sequence[LayerCorrection] = field(default=(), repr=False)
    why: str = ""

    @property
    def n_again(self) -> int:
        """The number of the outputs' tokens that are read again."""
        return int(sum(chosen.sum() for chosen in self.choice))

    @property
    def n_labels(self) -> int:
        """The number of the labels' tokens."""
        return sum(map(len, self.labels))


@dataclass(frozen=True)
class Material:
    """What choosers look at.

    Attributes:
        question: The words that the answer depends on: the task, and what the synthesizer is told.
        pieces: The bytes of each token of each output.
    """

    question: str
    pieces: Sequence[Sequence[bytes]]


Chooser = Callable[[Material], Scores]


def heads(material: Material) -> Scores:
    """Score the first tokens of each output, above everything else, and the very first ones highest."""
    return [(_FIRST - (at := np.arange(len(pieces)))) * (at < HEAD) for pieces in material.pieces]


def words(material: Material) -> Scores:
    """Score the tokens of the question's words and those around them, those of rare words highest.

    Words count as the same if they are equal but for capitals, or if one continues the other by up to three letters
    ("page" and "pages", "long" and "longest").
    """
    question = _Question(material.question)
    spans = [_words(b"".join(pieces)) for pieces in material.pieces]
    counts = Counter(word for output in spans for _, _, word in output)
    matches = {word: question.like(word) for word in counts}
    occurrences: Counter[str] = Counter()
    for word, count in counts.items():
        for q in matches[word]:
            occurrences[q] += count
    total = sum(counts.values())
    scores: Scores = []
    for pieces, output in zip(material.pieces, spans, strict=True):
        ends = np.cumsum([len(piece) for piece in pieces])
        score = np.zeros(len(pieces))
        for start, end, word in output:
            if not matches[word]:
                continue
            rarity = max(math.log(total / occurrences[q]) for q in matches[word])
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, end, side="left"))
            for i in range(max(first - _AROUND, 0), min(last + _AROUND + 1, len(pieces))):
                distance = max(first - i, i - last, 0)
                score[i] = max(score[i], rarity * (1 - distance / (2 * _AROUND + 2)))
        scores.append(score)
    return scores


def sentences(material: Material) -> Scores:
    """Score whole sentences by the question's words in them."""
    scores: Scores = []
    for pieces, by_word in zip(material.pieces, words(material), strict=True):
        ends = np.cumsum([len(piece) for piece in pieces])
        breaks = [match.end() for match in _SENTENCE_END.finditer(b"".join(pieces))]
        number = np.searchsorted(breaks, ends, side="left")  # of the sentence that each token ends in
        score = np.zeros(len(pieces))
        for n in set(number.tolist()):
            score[number == n] = sum(set(by_word[number == n].tolist()))
        scores.append(score)
    return scores


def last_sentence(material: Material) -> Scores:
    """Score the last sentence of each output, which often has its conclusion."""
    scores: Scores = []
    for pieces in material.pieces:
        text = b"".join(pieces).rstrip()
        before = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() < len(text)]
        ends = np.cumsum([len(piece) for piece in pieces])
        scores.append((ends > (before[-1] if before else 0)).astype(np.float64))
    return scores


CHOOSERS: dict[str, Chooser] = {
    "heads": heads,
    "words": words,
    "sentences": sentences,
    "last sentence": last_sentence,
}
DEFAULT_CHOOSERS = ("heads", "words")


def choose(
    model: Model,
    question: str,
    outputs: Sequence[Sequence[int]],
    share: float,
    choosers: Sequence[str] = DEFAULT_CHOOSERS,
) -> Choice:
    """Return which tokens of each output are read again.

    Args:
        model: Its vocabulary tells the tokens' texts.
        question: The words that the answer depends on.
        outputs: The tokens of each output.
        share: Most of all these tokens that may be chosen; 1 chooses all of them.
        choosers: The names of those whose scores are added up.

    Raises:
        InputError: There is no such chooser.
    """
    if unknown := [name for name in choosers if name not in CHOOSERS]:
        raise InputError(f"there is no chooser {unknown[0]!r}: choose from {', '.join(CHOOSERS)}")
    if not outputs or share >= 1:
        return [np.ones(len(output), np.bool_) for output in outputs]
    material = Material(question, [[model.piece(token) for token in output] for output in outputs])
    flat = np.zeros(sum(map(len, outputs)))
    for name in choosers:
        flat += np.concatenate(CHOOSERS[name](material))
    budget = min(int(share * len(flat)), int(np.count_nonzero(flat)))
    best = np.argsort(-flat, kind="stable")[:budget]
    chosen = np.zeros(len(flat), np.bool_)
    chosen[best] = True
    return np.split(chosen, np.cumsum([len(output) for output in outputs])[:-1])


_AS_FAST = 2 / 3  # of what text synthesis reads: for more than this, reading all of it is about as fast


def again_of(
    model: Model,
    reading: Reading,
    question: str,
    outputs: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    prompt: int,
    choosers: Sequence[str] = DEFAULT_CHOOSERS,
) -> Again | None:
    """Return what a synthesizer reads again of these outputs; None if they are only joined.

    Args:
        model: The model.
        reading: How much, and how.
        question: As `choose` takes it.
        outputs: The tokens of each output; none is empty.
        labels: The tokens of the label before each; empty without labels.
        prompt: Tokens of the synthesizer's prompt.
        choosers: As `choose` takes them.

    Raises:
        InputError: As `choose`.
    """
    if reading.joins_only or not outputs:
        return None
    choice = choose(model, question, outputs, reading.share, choosers)
    again = Again(labels=labels, choice=choice, correction=reading.correction, why=reading.why)
    others = again.n_labels + prompt
    n = sum(map(len, outputs))
    if reading.auto and again.n_again < n and again.n_again + others > _AS_FAST * (n + others):
        return replace(again, choice=choose(model, question, outputs, 1), why="reading all is about as fast")
    return again


def _words(text: bytes) -> list[tuple[int, int, str]]:
    """Return the words of a text: first byte, byte after the last, and the word in small letters."""
    return [(match.start(), match.end(), match[0].decode("utf-8", "replace").lower()) for match in _WORD.finditer(text)]


class _Question:
    """The words of a question, by themselves and by their beginnings: a question may be a long text."""

    _MOST_LETTERS = 3  # by which one word continues another
    _FEWEST_LETTERS = 4  # that both have

    def __init__(self, text: str) -> None:
        self._longer: dict[str, list[str]] = {}  # a beginning -> the words that continue it
        for word in {word for _, _, word in _words(text.encode("utf-8", "replace"))}:
            for beginning in {word, *self._beginnings(word)}:
                self._longer.setdefault(beginning, []).append(word)

    def like(self, word: str) -> list[str]:
        """Return the question's words that are this one, continue it, or are continued by it."""
        shorter = [b for b in self._beginnings(word) if b in self._longer.get(b, ())]
        return sorted({*self._longer.get(word, ()), *shorter})

    def _beginnings(self, word: str) -> list[str]:
        lengths = range(max(len(word) - self._MOST_LETTERS, self._FEWEST_LETTERS), len(word))
        return [word[:n] for n in lengths]
