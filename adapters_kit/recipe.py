"""A recipe: what to train, on what, how. YAML, Python and command-line flags are three spellings of the same fields.

    recipe = Recipe(model="path-or-hub-id", task="text-classification", data="reviews.csv", method="lora")
    recipe = Recipe.read("recipe.yaml", flags=["--method.r", "16", "--training.learning_rate", "1e-4"])

A recipe with mistakes is refused as a whole: one `RecipeError` lists every problem, with the line of the file or the
flag that it stands on and the nearest name that exists. No torch here: the answer comes in a fraction of a second.
"""

from __future__ import annotations

import codecs
import encodings.aliases
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters_kit import names, registry
from adapters_kit.errors import RecipeError, did_you_mean, nearest
from adapters_kit.recipe_text import Place, dump, parse_flags, parse_yaml
from adapters_kit.task_table import TASKS, tasks_with

Quantization = Literal["nf4", "fp4", "int8"]
"""The kinds of rounding that a base can be loaded with; `quantization.bnb_config` says what each is."""
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)

# Files of rows, which are no recipes.
DATA_SUFFIXES = (
    *(".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather"),
    *(".txt", ".md", ".conll", ".conllu", ".iob", ".bio", ".ft"),
)

_STRICT = ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
)


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise PydanticCustomError("unknown_task", "is no task")
    return name


TaskName = Annotated[str, AfterValidator(_known_task), WithJsonSchema({"type": "string", "enum": list(TASKS)})]


def _one_character(text: str) -> str:
    text = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(text) != 1 or text in '"\r\n\\':
        raise PydanticCustomError("delimiter", "a delimiter is one character, or tab")
    return text


def _known_encoding(name: str) -> str:
    try:
        codecs.lookup(name)
    except (LookupError, ValueError):
        near = did_you_mean(name, encodings.aliases.aliases) if nearest(name, encodings.aliases.aliases) else ""
        raise PydanticCustomError("encoding", "python knows no such encoding. {near}", {"near": near}) from None
    return name


Delimiter = Annotated[str, AfterValidator(_one_character)]
Encoding = Annotated[str, AfterValidator(_known_encoding)]


class MethodSpec(BaseModel):
    """The fine-tuning method: a name, then any option of that method's peft config (`r`, `lora_alpha` …)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str | list[str] = "lora"
    """Short name of a method (`adapters-kit methods` lists them), a list of names to train as one adapter, or the
    folder of a saved adapter to continue from."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str | list | tuple) else value

    @property
    def label(self) -> str:
        """The name in a few letters, such as "lora+prefix"."""
        return self.name if isinstance(self.name, str) else "+".join(self.name)

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name, as given."""
        return dict(self.model_extra or {})


class DataSpec(BaseModel):
    """Where the examples come from and which column is what."""

    model_config = _STRICT

    train: str
    """A CSV, TSV, JSON, JSONL, Parquet, Arrow, CoNLL, fastText or text file; a folder with files or folders named train
    and test (shards are joined), one saved by `datasets`, or with one sub-folder of images a class; or a hub id."""
    test: str | None = None
    """The held-out examples; without it, `train`'s own test part is used, or `test_size` of the rows are set aside."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Role to column name, such as {text: review, label: stars}; recognised by name where left out."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    delimiter: Delimiter | None = None
    """What separates the fields of CSV and TSV files: one character, or tab; found by looking if left out."""
    encoding: Encoding | None = None
    """How text files are encoded, such as utf-16 or cp1252; if left out, UTF-8, or what the bytes look like."""
    test_size: float = Field(0.1, gt=0)
    """Held-out part when no test set is given: a fraction below 1, or a number of rows."""
    limit: int | None = Field(None, ge=1)
    """Use at most so many training rows (drawn with the seed)."""
    test_limit: int | None = Field(None, ge=1)
    """Use at most so many held-out rows (drawn with the seed)."""

    source_lang: str | None = None
    """Translation: the language of the sources, as the model's tokenizer writes it (eng_Latn, en_XX, en); by default
    the one that the tokenizer was saved with."""
    target_lang: str | None = None
    """Translation: the language of the targets; answers begin with its code."""
    source_prefix: str | None = None
    """Text put before every source, such as T5's "summarize: "."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"train": str(value)} if isinstance(value, str | Path) else value


class TrainingSpec(BaseModel):
    """How to train."""

    model_config = _STRICT

    epochs: float = Field(3.0, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; by default the one that suits the method."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of a task head, and of whatever else is trained as a full copy beside the adapter; by default
    the method's, at most 6e-4."""
    batch_size: int = Field(16, ge=1)
    """Examples in one forward pass on one device."""
    eval_batch_size: int | None = Field(None, ge=1)
    """Examples in one forward pass of an evaluation; by default twice `batch_size`."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes to one optimizer step; the effective batch is this times `batch_size` times the devices."""
    max_length: int | None = Field(None, ge=2)
    """Longest input in tokens, longer ones are cut; by default what the model can take, at most 512."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lora+", "lora-fa"] = "adamw"
    """The optimizer; the 8-bit and paged ones need bitsandbytes."""
    lora_plus_ratio: float | None = Field(None, gt=0)
    """LoRA+: the learning rate of the B matrices over that of the A matrices (16 is usual)."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Part of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    base_dropout: float | None = Field(None, ge=0, lt=1)
    """Probability of the base model's own dropout layers while training; by default the model's, and 0 for a prefix,
    which learns slowly enough without that noise."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to at most this norm; 0 leaves them alone."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds the split, the new parameters, the order of the examples and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the frozen weights and of the arithmetic; auto is bf16 on a GPU that has it, else fp32. Adapter
    parameters stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    recompute: Literal["cheap"] | None = None
    """cheap: compute activation × gate and norms again in the backward pass; saves less than `gradient_checkpointing`,
    and costs a few per cent of a step."""
    fuse: bool = True
    """Use the fused LoRA layers, where the model's layers allow."""
    chunked_loss: bool = True
    """Causal LM: compute the loss in pieces, so that the logits of a whole batch never exist at once."""
    packing: bool = False
    """Causal LM: several examples to a row of `max_length` tokens, each seeing only itself."""
    group_by_length: bool = True
    """Put examples of similar length in a batch, so that little of it is padding."""
    evals_per_epoch: int = Field(1, ge=0)
    """Evaluations during an epoch; 0 leaves the one at the end only."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better score."""
    keep_best: bool = True
    """Keep the adapter of the best evaluation, not of the last step."""
    save_every: int | None = Field(None, ge=1)
    """Write a checkpoint to resume from every so many steps; by default at every evaluation."""
    auto_batch: bool = False
    """Out of memory: halve `batch_size`, double `gradient_accumulation`, and start again."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between two lines of `metrics.jsonl`."""
    log_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(default_factory=list)
    """Trackers that receive the metrics too."""
    samples: int = Field(8, ge=0)
    """Held-out examples whose predictions, base beside tuned, are written to `samples.jsonl`."""


class CardSpec(BaseModel):
    """What the model card says, beside what was trained, on what and how well."""

    model_config = _STRICT

    samples: bool = False
    """Put the first samples onto the card, which travels with the adapter: they are rows of your data, and answers.
    The run folder has them in `samples.jsonl` in any case."""


class Recipe(BaseModel):
    """One training run, completely described.

    Raises:
        RecipeError: listing every problem found.
    """

    model_config = _STRICT

    version: Literal[1] = 1
    """Version of this format."""
    model: str
    """The base model: a folder, a hub id or a .gguf file."""
    task: TaskName
    """What the model learns to do."""
    data: DataSpec
    """The examples: a path, or a mapping with the keys below."""
    method: MethodSpec = MethodSpec()
    """The fine-tuning method: a name, or a mapping of `name` and options."""
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
    answer_only: bool = True
    """Causal LM with prompts or chats: only the answer's tokens count in the loss."""
    max_new_tokens: int = Field(128, ge=1)
    """Generation: longest answer in tokens."""
    training: TrainingSpec = TrainingSpec()
    """How to train."""
    card: CardSpec = CardSpec()
    """What the model card says."""

    def __init__(self, **fields: Any) -> None:
        problems = _cross_checks(fields)
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
            path: the file; None starts from nothing, all fields coming from the flags.
            flags: as typed, e.g. ["--method.r", "16", "--training.packing"]. `--key=value` works too, and a flag
                without a value is true.

        Raises:
            RecipeError: every problem of the file and the flags, each with its line or flag.
        """
        fields: dict[str, Any] = {}
        places: dict[tuple[str, ...], Place] = {}
        problems: list[tuple[Place, str]] = []
        if path is not None:
            path = Path(path)
            if not path.is_file():
                near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
                raise RecipeError([f"No file {str(path)!r}. {near}".rstrip()], source=f"the recipe {path}")
            if path.suffix.lower() in DATA_SUFFIXES:
                raise RecipeError(
                    [
                        f"{path} is data, not a recipe. Say what to learn from it and with which model: "
                        f"adapters-kit train {path} --task TASK --model MODEL, TASK being one of {', '.join(TASKS)}; "
                        f"or let adapters-kit init {path} write a recipe."
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
    }
    for name, spellings in short.items():
        field = made["properties"][name]
        made["properties"][name] = {"description": field.pop("description", ""), "anyOf": [*spellings, field]}
    return made


Problem = tuple[tuple[str, ...], str]  # dotted path, sentence


# The mappings inside a recipe; "" is the recipe itself.
_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "data": DataSpec,
    "method": MethodSpec,
    "training": TrainingSpec,
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
            problems.append((path, f"{given!r} does not fit: {item['msg'][:1].lower() + item['msg'][1:]}."))
    return problems


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
    return list(_SECTIONS[path[0] if path else ""].model_fields)


def _cross_checks(fields: Mapping[str, Any]) -> list[Problem]:
    """What one field alone cannot know. Works on raw input, so that these problems are told with all the others."""

    def part(name: str) -> Mapping[str, Any]:
        value = fields.get(name)
        if isinstance(value, BaseModel):
            value = value.model_dump()
        return value if isinstance(value, Mapping) else {}

    problems: list[Problem] = []
    task, training = fields.get("task"), part("training")

    method = fields.get("method", "lora")
    method = method if isinstance(method, str | list | tuple) else part("method").get("name", "lora")
    known = registry.known_names()
    for name in method if isinstance(method, list | tuple) else [method]:
        if not isinstance(name, str) or registry.canonical(name) in known:
            continue
        if not names.is_adapter_folder(name):
            missing = f"no {names.ADAPTER_CONFIG} in that folder."
            reason = missing if names.looks_like_folder(name) else did_you_mean(name, known)
            problems.append((("method",), f"there is no method {name!r}: {reason}"))

    for key, value in part("method").items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append((("method", str(key)), f"{value!r} does not fit: give a finite number."))

    row = TASKS.get(task) if isinstance(task, str) else None
    roles = row.roles if row else ()
    columns = part("data").get("columns")
    for role in columns if row and isinstance(columns, Mapping) else ():
        if role not in roles:
            text = f"the task {task} has no column {role!r}. {did_you_mean(str(role), roles)}"
            problems.append((("data", "columns", str(role)), text))
    for key in dict.fromkeys(key for other in TASKS.values() for key in other.keys) if row else ():
        section, _, last = key.rpartition(".")
        default = _SECTIONS[section].model_fields[last].default
        given = (part(section) if section else fields).get(last, default)
        if given != default and task not in tasks_with(key):
            owners = " and ".join(tasks_with(key))
            problems.append((tuple(key.split(".")), f"only {owners} has this key; the task is {task}."))
    if training.get("early_stopping") and training.get("evals_per_epoch", 1) == 0:
        problems.append((("training", "early_stopping"), "needs evaluations: set evals_per_epoch to 1 or more."))
    if fields.get("quantize") and training.get("precision") == "fp32" and fields["quantize"] == "int8":
        problems.append((("training", "precision"), "int8 weights compute in 16 bits: use auto, bf16 or fp16."))
    return problems


def _place(path: tuple[str, ...], places: Mapping[tuple[str, ...], Place]) -> Place:
    """Where the path, or the nearest thing around it, was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    for known, place in places.items():
        if known[: len(path)] == path:  # a flag such as --method.name, where the file has no `method`
            return place
    return Place("", 10**9)


if __name__ == "__main__":  # python -m adapters_kit.recipe > adapters_kit/recipe.schema.json
    import json

    print(json.dumps(schema(), indent=2))
