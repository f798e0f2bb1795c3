"""What was done to a user's rows that the user did not ask for by name: cut, left out, read in a way that was guessed.

Whoever does such a thing says it once, here. Training prints the sentences, and writes them with their counts into
metrics.json and the model card; evaluation and prediction print them.

    notes = Notes()
    with notes.about("training data"):
        notes.say("12 of 400 rows are empty and were left out.", rows_left_out=12)
    notes.fresh()  # ["training data: 12 of 400 rows are empty and were left out."]
    notes.counts   # {"rows_left_out": 12}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters_kit.errors import DataError


class Notes:
    """Sentences in the order in which they were said, each once, and counts by name, added up.

    Attributes:
        sentences: all that was said.
        counts: name to number; a sentence that is said again does not count again.
        counted: sentence to its own counts.
    """

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.counts: dict[str, int] = {}
        self.counted: dict[str, dict[str, int]] = {}
        self._part = ""
        self._told = 0

    def say(self, text: str, **counts: int) -> None:
        """Adds a sentence, and to each of `counts` its number (names as in "turns_cut", the same for all parts)."""
        text = f"{self._part}: {text}" if self._part else text
        if text in self.sentences:
            return
        self.sentences.append(text)
        self.counted[text] = counts
        for name, number in counts.items():
            self.counts[name] = self.counts.get(name, 0) + number

    @contextmanager
    def about(self, part: str) -> Iterator[None]:
        """Sentences said inside begin with `part` ("training data", "held-out data"), so that equal ones differ.

        So does a DataError that is raised inside.
        """
        before, self._part = self._part, part
        try:
            yield
        except DataError as error:
            raise DataError(f"{part}: {error}") from error
        finally:
            self._part = before

    def fresh(self) -> list[str]:
        """The sentences that no earlier call has returned: what is to be printed now."""
        new, self._told = self.sentences[self._told :], len(self.sentences)
        return new
