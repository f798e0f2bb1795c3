"""Which column plays which role, and which play none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from adapters_kit.errors import DataError, did_you_mean
from adapters_kit.tasks.turns import by_turns, pair_in, written_out
from adapters_kit.training.data.json_tables import unlike

_LOOKED_AT = 1000  # rows
# Roles of lists and objects, which may stand there as JSON's text.
_PARSED = (
    *("messages", "prompt", "completion", "tools", "history", "spans", "chosen", "rejected"),
    *("objects", "boxes", "classes"),
)
_TALKS = ("messages", "conversation", "conversations", "chat", "data", "dialog", "dialogue", "utterances", "turns")
# Names under which a role's column is recognised, best first; a role without an entry goes by its own name.
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "review", "content", "comment", "sentence1", "premise", "question1", "document"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2", "question"),
    "label": ("label", "labels", "class", "category", "sentiment", "rating", "stars", "score", "gold_label"),
    "prompt": ("prompt", "instruction", "question", "query", "input", "user", "inputs", "problem", "questions"),
    "completion": (
        *("completion", "response", "answer", "output", "chosen", "assistant", "targets", "target", "solution"),
        "answers",
    ),
    "input": ("input", "context", "story", "passage"),
    "history": ("history",),
    "system": ("system", "system_prompt", "systeminstruction", "system_instruction"),
    "tools": ("tools", "functions"),
    "messages": ("messages", "conversation", "conversations", "chat"),
    "tokens": ("tokens", "words", "word"),
    "tags": ("tags", "ner_tags", "labels", "pos_tags", "tag"),
    "spans": ("spans", "entities", "ents", "label", "labels", "annotations", "annotation", "ner"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers", "answer", "answer_text", "answers_spans"),
    "source": ("source", "src", "input", "inputs", "document", "article", "dialogue", "text", "question"),
    "target": ("target", "tgt", "output", "targets", "summary", "highlights", "translation", "answer"),
    "audio": ("audio", "speech", "sound", "recording", "wav", "clip", "file_name", "file", "path"),
    "transcript": ("transcript", "transcription", "text", "sentence", "normalized_text"),
    "sampling_rate": ("sampling_rate", "sample_rate"),
    "anchor": ("anchor", "query", "question", "sentence1", "text1", "text", "sentence", "premise", "source"),
    "positive": (
        *("positive", "pos", "positives", "document", "passage", "answer", "sentence2", "text2", "text_pair"),
        *("hypothesis", "target"),
    ),
    "negative": ("negative", "neg", "negatives", "hard_negative", "hard_negatives"),
    "score": ("score", "similarity", "similarity_score", "label", "relevance"),
    "chosen": (
        *("chosen", "preferred", "accepted", "winner", "better", "response_j", "answer_j", "completion_a"),
        *("chosen_response", "chosen_answer", "response_chosen", "answer_chosen", "preferred_response"),
    ),
    "rejected": (
        *("rejected", "dispreferred", "rejected_response", "rejected_answer", "loser", "worse", "response_k"),
        *("answer_k", "completion_b", "response_rejected", "answer_rejected", "dispreferred_response"),
    ),
    "score_chosen": ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating", "rating_chosen"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected-rating", "rejected_rating", "rating_rejected"),
    "query": ("query", "question", "search_query", "anchor"),
    "document": ("document", "passage", "doc", "text", "answer", "context"),
    "objects": ("objects", "annotations", "annotation"),
    "boxes": ("boxes", "bboxes", "bbox", "box"),
    "classes": ("classes", "categories", "category", "labels", "label", "class_labels", "class"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "image": ("image", "img", "picture", "file_name", "file", "path"),
}


def recognise(
    data: Dataset, given: Mapping[str, str], alternatives: Sequence[Sequence[str]], optional: Sequence[str] = ()
) -> dict[str, str]:
    """Which column plays which role.

    Args:
        given: role to column name, from the user; these are binding.
        alternatives: sets of roles, any one of which is enough; the first that can be filled wins.
        optional: roles used if their column is there.

    Raises:
        DataError: with the columns that exist and how to name them.
    """
    names = data.column_names
    missing = {role: column for role, column in given.items() if column not in names}
    if missing:
        told = "; ".join(f"{role}: {column!r}. {did_you_mean(column, names)}" for role, column in missing.items())
        raise DataError(f"data.columns names columns that the data does not have. {told}")
    lower = {name.lower().strip(): name for name in names}

    def find(role: str, taken: Sequence[str]) -> str | None:
        if role in given:
            return given[role]
        aliases = ALIASES.get(role, (role,))
        return next((lower[a] for a in aliases if a in lower and lower[a] not in taken), None)

    ranked = sorted(alternatives, key=lambda roles: -len(set(roles) & set(given)))
    for roles in ranked:
        found: dict[str, str] = {}
        for role in dict.fromkeys([*roles, *optional]):
            column = find(role, [*found.values(), *(given[other] for other in given if other != role)])
            if column is not None:
                found[role] = column
        if all(role in found for role in roles):
            if found.get("text_pair", "").lower().strip() == "question" and not {"text", "text_pair"} & set(given):
                found["text"], found["text_pair"] = found["text_pair"], found["text"]  # as GLUE has it
            _refuse_unlike(data, found)
            return found
    first = data[0] if len(data) else {}
    talks = [name for name in names if holds_conversations(first, name)]
    talk = any("messages" in roles for roles in alternatives) and "messages" not in given
    if talk and len(talks) == 1:
        return recognise(data, {**given, "messages": talks[0]}, alternatives, optional)
    if talk and talks:
        raise DataError(
            f"The columns {', '.join(map(repr, talks))} hold conversations. Name the one that is meant: "
            f"data.columns: {{messages: {talks[0]}}}"
        )
    languages = [name for name in names if name.startswith(("translation.", "translations."))]
    if len(languages) > 1 and ("source", "target") in map(tuple, alternatives):
        raise DataError(
            f"The columns {', '.join(languages)} hold the same in several languages. Say which is translated into "
            f"which: data.columns: {{source: {languages[0]}, target: {languages[1]}}}, or the other way round."
        )
    wanted = " or ".join(" and ".join(roles) for roles in alternatives)
    examples = ["{" + ", ".join(f"{role}: NAME" for role in roles) + "}" for roles in alternatives]
    row = header_is_a_row(data)
    if names == ["text"] and not any(set(roles) <= {"text"} for roles in alternatives):
        row = "Text files hold running text: write rows of several columns as CSV, TSV or JSON Lines, with their names."
    raise DataError(
        f"Cannot tell which column is what: the task needs {wanted}, the data has the columns {', '.join(names)}. "
        + (row or f"Name them in the recipe: data.columns: {', or '.join(examples)}")
    )


def _refuse_unlike(data: Dataset, columns: Mapping[str, str]) -> None:
    """Refuses columns that play a role and hold values of several kinds; in all others, nobody reads them."""
    for role, column in columns.items():
        if reason := unlike(data.data.table, column, nested=role in _PARSED):
            raise DataError(reason)


def header_is_a_row(data: Dataset) -> str | None:
    """A sentence if a column's name is also a value in it, as in a table without a line of names; else None."""
    texts = [name for name, kind in data.features.items() if getattr(kind, "dtype", "") == "string"]
    first = data.select_columns(texts).select(range(min(len(data), _LOOKED_AT)))[:] if texts else {}
    for name in texts:
        if name in first[name]:
            return (
                f"The first line is taken for the names of the columns, but {name!r} is also a value in the lines "
                "below it. If that line is a row, put a line with names above it, such as "
                f"{', '.join(('text', 'label', *(f'column{i}' for i in range(3, 99)))[: len(data.column_names)])}."
            )
    return None


def holds_conversations(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row's cell of a column is a list of turns, or the JSON of one: each with who speaks, or a question
    and its answer, or, under a name for talks, a text of the user's and of the assistant's by turns."""
    first = written_out(row.get(column))
    if isinstance(first, list) and column.lower().strip() in _TALKS:
        first = by_turns(first)
    return (
        isinstance(first, list)
        and bool(first)
        and all(isinstance(turn, Mapping) and ({"role", "from"} & set(turn) or pair_in(turn)) for turn in first)
    )


def unused(data: Dataset, used: Mapping[str, str], roles: Sequence[str]) -> str | None:
    """A sentence that lists the columns without a role, each with the mapping that would use it; None if all have one.

    Args:
        used: role to column.
        roles: all roles of the task.
    """
    left = [name for name in data.column_names if name not in used.values()]
    if not left:
        return None
    free = [role for role in roles if role not in used] or list(roles)

    first = data[0] if len(data) else {}

    def mapping(column: str) -> str:
        if "messages" in roles and holds_conversations(first, column):
            return f"data.columns: {{messages: {column}}}"
        by_alias = (role for role in [*free, *roles] if column.lower().strip() in ALIASES.get(role, (role,)))
        return f"data.columns: {{{next(by_alias, free[0])}: {column}}}"

    told = ", ".join(f"{name} ({mapping(name)} would use it)" if len(left) <= 5 else name for name in left)
    more = "" if len(left) <= 5 else f". To use one, name it: {mapping(left[0])}"
    return f"Columns that are not used: {told}{more}."
