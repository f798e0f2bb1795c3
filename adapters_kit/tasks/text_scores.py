"""Scores of written text: BLEU, chrF and ROUGE, by words or, where a script has no spaces, characters; SQuAD's."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from adapters_kit.errors import MissingPackageError

# Scripts whose words stand without spaces between them, by the first word of a character's Unicode name.
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}


def script_of(character: str) -> str:
    """The first word of a character's name in Unicode; empty for ASCII, which has one script."""
    return "" if character.isascii() else unicodedata.name(character, "?").split(" ")[0]


def stands_alone(character: str) -> bool:
    """Whether a character is of a script that writes no spaces between words."""
    return script_of(character) in _WITHOUT_SPACES


def script_without_spaces(texts: Sequence[str]) -> str | None:
    """The script that most letters of the texts are in, if it writes no spaces; None for all others."""
    counts: dict[str, int] = {}
    letters = 0
    for text in texts[:1000]:
        for character in text[:2000]:
            if character.isalpha():
                letters += 1
                if script := script_of(character):
                    counts[script] = counts.get(script, 0) + 1
    found = {script: count for script, count in counts.items() if script in _WITHOUT_SPACES}
    return max(found, key=lambda script: found[script]) if 2 * sum(found.values()) > letters else None


class Units:
    """What ROUGE counts: words of letters and digits in any script, and single characters where there are no spaces.

    On English text it is what the `rouge_score` package does by itself.
    """

    def tokenize(self, text: str) -> list[str]:
        """The units of a text, in lower case."""
        units: list[str] = []
        word = ""
        for character in unicodedata.normalize("NFC", text).lower():
            kind = unicodedata.category(character)
            if stands_alone(character):
                units += [word] * bool(word)
                word = ""
                if kind[0] == "M" and units:
                    units[-1] += character  # a vowel or tone belongs to the letter before it
                elif kind[0] in "LN":
                    units.append(character)
            elif kind[0] in "LNM":
                word += character
            else:
                units += [word] * bool(word)
                word = ""
        return units + [word] * bool(word)


def text_scores(guesses: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF (0 to 100), ROUGE-1, -2 and -L (F1, 0 to 1)."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is needed: pip install 'adapters-kit[metrics]'") from error
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, tokenizer=Units())
    each = [scorer.score(text, guess) for guess, text in zip(guesses, truth, strict=True)]
    script = script_without_spaces(truth)
    chinese = script == "CJK" and not re.search("[\u3040-\u30ff]", "".join(truth[:1000]))
    units = {"tokenize": "zh" if chinese else "char"} if script else {}
    return {
        "bleu": sacrebleu.corpus_bleu(list(guesses), [list(truth)], **units).score,
        "chrf": sacrebleu.corpus_chrf(list(guesses), [list(truth)]).score,
        **{kind: sum(score[kind].fmeasure for score in each) / len(each) for kind in kinds},
    }


def how_counted(truth: Sequence[str]) -> str | None:
    """A sentence where the scores count characters instead of words; None where they count words."""
    script = script_without_spaces(truth)
    if script is None:
        return None
    return (
        f"BLEU and ROUGE count characters, not words: most letters of the answers are {script}, written without spaces."
    )


def exact_match(guess: str, texts: Sequence[str]) -> bool:
    """Whether a guess is one of the answers, as SQuAD compares; an empty one where there are none."""
    return any(plain(guess) == plain(text) for text in texts) if texts else not plain(guess)


def overlap_of(guess: str, texts: Sequence[str]) -> float:
    """The best F1 of a guess with one of the answers; 1 for an empty guess where there are none."""
    return max((word_f1(guess, text) for text in texts), default=float(not plain(guess)))


def plain(text: str) -> str:
    """As SQuAD compares: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(guess: str, truth: str) -> float:
    """F1 of the words that two answers share."""
    left, right = plain(guess).split(), plain(truth).split()
    shared = sum((Counter(left) & Counter(right)).values())
    if not left or not right:
        return float(left == right)
    return 2 * shared / (len(left) + len(right))
