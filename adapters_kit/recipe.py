"""A recipe: what to train, on what, how. YAML, Python and command-line flags are three spellings of the same fields.

    recipe = Recipe(model="path-or-hub-id", task="text-classification", data="reviews.csv", method="lora")
    recipe = Recipe.read("recipe.yaml", flags=["--method.r", "16", "--training.learning_rate", "1e-4"])

A recipe with mistakes is refused as a whole: one `RecipeError` lists every problem, with the line of the file or the
flag that it stands on and the nearest name that exists. No torch here: the answer comes in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
)

from adapters_kit.errors import RecipeError, UnknownNameError, did_you_mean, nearest
from adapters_kit.names import check_name
from adapters_kit.quantization_table import Quantization
from adapters_kit.recipe_checks import Problem, cross_checks
from adapters_kit.recipe_sections import (
    DATA_SUFFIXES,
    STRICT,
    AugmentSpec,
    CardSpec,
    DataSpec,
    EvalSpec,
    MethodSpec,
    MixSpec,
    ObjectiveSpec,
    PathText,
    TaskName,
    TrainingSpec,
    rows_suffix,
)
from adapters_kit.recipe_text import Place, dump, parse_flags, parse_yaml
from adapters_kit.task_table import OBJECTIVES, TASKS

RECIPE = "recipe.yaml"
"""The recipe in a run folder."""


class Recipe(BaseModel):
    """One training run, completely described.

    Raises:
        RecipeError: listing every problem found.
    """

    model_config = STRICT

    version: Literal[1] = 1
    """Version of this format."""
    model: PathText
    """The base model: a folder, a hub id or a .gguf file."""
    task: TaskName
    """What the model learns to do."""
    data: DataSpec
    """The examples: a path, or a mapping with the keys below."""
    method: MethodSpec = MethodSpec()
    """The fine-tuning method: a name, or a mapping of `name` and options."""
    objective: ObjectiveSpec | None = None
    """Causal LM: what is learned by, instead of the answers' text: a name, or a mapping of `name` and options."""
    problem: Literal["single-label", "multi-label", "regression"] | None = None
    """Text classification: kind of target; single-label unless the labels are lists (multi-label)."""
    unanswerable: bool | None = None
    """Question answering: questions may have no answer; by default if the training data has such questions."""
    no_answer_threshold: float = 0.0
    """Question answering: the answer is empty where that is likelier than the best span by more than this (nats)."""
    labels: list[str] | None = None
    """The classes in the order of the model's outputs; by default those of the training data, sorted."""
    quantize: Literal[Quantization, "keep"] | None = None
    """Hold the frozen weights at 4 or 8 bits (bitsandbytes); keep: a .gguf file's weights stay in its own blocks."""
    trust_remote_code: bool = False
    """Run the Python files that come with the base model, with all that you may do on this machine. Needed only by
    architectures that transformers does not have; read the files first. The card says it."""
    answer_only: bool = True
    """Causal LM with prompts or chats: only the answer's tokens count in the loss."""
    max_new_tokens: int = Field(128, ge=1)
    """Generation: longest answer in tokens."""
    training: TrainingSpec = TrainingSpec()
    """How to train."""
    eval: EvalSpec = EvalSpec()
    """What is scored beside the held-out rows."""
    card: CardSpec = CardSpec()
    """What the model card says."""

    def __init__(self, **fields: Any) -> None:
        problems = cross_checks(fields, _SECTIONS)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = _explain(error) + problems
        if problems:
            texts = [f"{'.'.join(path)}: {text}" for path, text in problems]
            raise RecipeError(texts, paths=[path for path, _ in problems])

    @classmethod
    def read(cls, path: str | Path | None, flags: Sequence[str] = ()) -> Recipe:
        """The recipe of a YAML file, with command-line flags laid over it.

        Args:
            path: the file, or a run folder, whose recipe is meant; None starts from nothing, all fields coming from the
                flags.
            flags: as typed, e.g. ["--method.r", "16", "--training.packing"]. `--key=value` works too, and a flag
                without a value is true.

        Raises:
            RecipeError: every problem of the file and the flags, each with its line or flag.
        """
        fields: dict[str, Any] = {}
        places: dict[tuple[str, ...], Place] = {}
        problems: list[tuple[Place, str]] = []
        if path is not None:
            check_name(path, UnknownNameError)
            path = Path(path)
            if (path / RECIPE).is_file():
                path = path / RECIPE
            if not path.is_file():
                near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
                raise RecipeError([f"No file {str(path)!r}. {near}".rstrip()], source=f"the recipe {path}")
            if rows_suffix(path) in DATA_SUFFIXES:
                raise RecipeError(
                    [
                        f"{path} is data, not a recipe. Say what to learn from it and with which model: "
                        f"{{'data': {str(path)!r}, 'task': TASK, 'model': MODEL}}, TASK being one of "
                        f"{', '.join(TASKS)}; or let `adapters-kit init {path}` write a recipe."
                    ],
                    source=f"the recipe {path}",
                )
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                where = f"byte {error.object[error.start]:#04x} at {error.start}"
                raise RecipeError(
                    [f"It is not UTF-8 text ({where}): save it as UTF-8."], f"the recipe {path}"
                ) from None
            fields, places, problems = parse_yaml(text)
        problems += parse_flags(flags, fields, places, known_flags())
        try:
            recipe = cls(**fields)
            if not problems:
                return recipe
        except RecipeError as error:
            found = zip(error.paths, error.problems, strict=True)
            problems += [(_place(key, places), text) for key, text in found]
        problems.sort(key=lambda item: item[0].order)
        where = f"the recipe {path}" if path is not None else "the flags"
        raise RecipeError([f"{place.text}{': ' if place.text else ''}{text}" for place, text in problems], where)

    @property
    def head(self) -> str:
        """The task whose model class is trained: the recipe's, but for a reward model."""
        return OBJECTIVES[self.objective.name].head if self.objective else self.task

    def changed(self, **values: Any) -> Recipe:
        """A copy with some fields changed; a dotted name reaches inside.

        Example:
            >>> recipe = Recipe(model="m", task="causal-lm", data="d.jsonl")
            >>> recipe.changed(**{"training.seed": 1, "method.r": 4}).method.options
            {'r': 4}
        """
        fields = self.model_dump()
        for dotted, value in values.items():
            *parents, last = dotted.split(".")
            inside = fields
            for parent in parents:
                inside = inside[parent]
            inside[last] = value
        return type(self)(**fields)

    def to_yaml(self) -> str:
        """The recipe as YAML with every field written out; `Recipe.read` gives an equal recipe back."""
        return dump(self.model_dump(mode="json"))


def known_flags() -> dict[str, str]:
    """Every dotted key of a recipe and its help text, in the order of the file."""
    found = {}
    for name, field in Recipe.model_fields.items():
        found[name] = field.description or ""
        inner = _SECTIONS.get(name)
        for key, part in inner.model_fields.items() if inner else ():
            found[f"{name}.{key}"] = part.description or ""
    return found


def keys_of(flags: Sequence[str]) -> dict[str, Any]:
    """Flags as dotted keys and values: ["--training.seed", "1"] -> {"training.seed": 1}.

    Raises:
        RecipeError: a key that no recipe has.
    """
    fields: dict[str, Any] = {}
    places: dict[tuple[str, ...], Place] = {}
    problems = parse_flags(flags, fields, places, known_flags())
    if problems:
        raise RecipeError([f"{place.text}: {text}" for place, text in problems], "the flags")

    def value(path: tuple[str, ...]) -> Any:
        inside: Any = fields
        for part in path:
            inside = inside[part]
        return inside

    return {".".join(path): value(path) for path in places}


def schema() -> dict[str, Any]:
    """JSON schema of the recipe file, for editors: `data` and `method` have short spellings there."""
    made = Recipe.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "adapters_kit recipe"
    short: dict[str, list[dict[str, Any]]] = {
        "data": [{"type": "string"}],
        "method": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "objective": [{"type": "string", "enum": list(OBJECTIVES)}],
    }
    for name, spellings in short.items():
        field = made["properties"][name]
        made["properties"][name] = {"description": field.pop("description", ""), "anyOf": [*spellings, field]}
    return made


# The mappings inside a recipe; "" is the recipe itself.
_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "data": DataSpec,
    "method": MethodSpec,
    "objective": ObjectiveSpec,
    "training": TrainingSpec,
    "eval": EvalSpec,
    "card": CardSpec,
}


def _explain(error: ValidationError) -> list[Problem]:
    """Pydantic's findings in our words."""
    problems = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        given = item.get("input")
        if item["type"] == "extra_forbidden":
            siblings = _keys_at(path[:-1])
            where = f" in {'.'.join(path[:-1])!r}" if path[1:] else ""
            problems.append((path, f"there is no key {path[-1]!r}{where}. {did_you_mean(path[-1], siblings)}"))
        elif item["type"] == "missing":
            problems.append((path, f"is missing{_MISSING.get('.'.join(path), ' and has no default')}."))
        elif item["type"] in ("literal_error", "unknown_task"):
            choices = _choices(item["ctx"]["expected"]) if item["type"] == "literal_error" else list(TASKS)
            problems.append((path, f"{given!r} is not one of {', '.join(choices)}. {_near(str(given), choices)}"))
        else:
            told = _ELSEWHERE.get(".".join(path), f"{item['msg'][:1].lower() + item['msg'][1:]}.")
            problems.append((path, f"{_short(given)} does not fit: {told}"))
    return problems


def _short(value: Any) -> str:
    """A value as its user wrote it; of objects the kind alone, whose text would fill the screen."""
    if isinstance(value, str | int | float | bool | list | tuple | dict | None):
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:200]} …"
    return f"an object of the kind {type(value).__name__}"


# Where objects that no recipe can write down may go instead.
_ELSEWHERE = {
    "model": "give the folder or hub id that it comes from; a model in memory is for ak.wrap and a Trainer.",
    "method": "give its name and options, {'name': 'lora', 'r': 8}; ak.wrap takes a peft config.",
    "eval.keep": "give a file, a folder or a hub id; ak.train takes rows in memory, in a dict of the recipe's keys.",
    "data": "give a file, a folder or a hub id; ak.train takes rows in memory, in a dict of the recipe's keys.",
    "data.train": "give a file, a folder or a hub id; ak.train takes rows in memory, in a dict of the recipe's keys.",
}


_MISSING = {
    "task": f"; it is one of {', '.join(TASKS)}",
    "model": "; it is a folder, a hub id or a .gguf file",
    "data": "; it is a CSV, TSV, JSON, JSONL, Parquet or text file, a folder or a hub id",
    "data.train": "; it is a CSV, TSV, JSON, JSONL, Parquet or text file, a folder or a hub id",
}


def _near(given: str, choices: list[str]) -> str:
    """The hint alone: the message has named all choices already."""
    return did_you_mean(given, choices) if nearest(given, choices) else ""


def _choices(expected: str) -> list[str]:
    return [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]


def _keys_at(path: tuple[str, ...]) -> list[str]:
    if path[:2] == ("data", "mix"):
        return list(MixSpec.model_fields)
    if path[:2] == ("data", "augment"):
        return list(AugmentSpec.model_fields)
    return list(_SECTIONS[path[0] if path else ""].model_fields)


def _place(path: tuple[str, ...], places: Mapping[tuple[str, ...], Place]) -> Place:
    """Where the path, or the nearest thing around it, was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    for length in range(len(path), 0, -1):
        for known, place in places.items():
            if known[:length] == path[:length]:  # a flag such as --method.name, where the file has no `method`
                return place
    return Place("", 10**9)


if __name__ == "__main__":  # python -m adapters_kit.recipe > adapters_kit/recipe.schema.json
    import json

    print(json.dumps(schema(), indent=2))
