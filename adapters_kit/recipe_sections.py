"""The sections of a recipe: method, data, training, eval, card. A field's docstring is its help on the command line."""

from __future__ import annotations

import codecs
import encodings.aliases
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters_kit.errors import did_you_mean, nearest
from adapters_kit.names import adapter_inside
from adapters_kit.task_table import OBJECTIVES, TASKS

# Files of rows, which are no recipes.
DATA_SUFFIXES = (
    *(".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather"),
    *(".txt", ".md", ".conll", ".conllu", ".iob", ".bio", ".ft"),
)
PACKED_SUFFIXES = (".gz", ".bz2", ".zst", ".lz4")  # of one such file, compressed


def rows_suffix(path: Path) -> str:
    """What says how a file's rows are read, in small letters: of `rows.CSV.gz` it is `.csv`."""
    packed = path.suffix.lower() in PACKED_SUFFIXES
    return (Path(path.stem) if packed else path).suffix.lower()


STRICT = ConfigDict(
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
_Options = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]  # alike in every version of pydantic
PathText = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
"""A text that names a file, a folder or something on the hub; a `Path` or a `Run` becomes one."""


class MethodSpec(BaseModel):
    """The fine-tuning method: a name, then any option of that method's peft config (`r`, `lora_alpha` …)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str | list[str] = "lora"
    """Short name of a method (`adapters-kit methods` lists them), a list of names to train as one adapter, or the
    folder of a saved adapter, or of its run, to continue from."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        return {"name": value} if isinstance(value, str | list | tuple) else value

    @field_validator("name")
    @classmethod
    def _adapter_of_a_run(cls, name: str | list[str]) -> str | list[str]:
        return adapter_inside(name) if isinstance(name, str) else [adapter_inside(one) for one in name]

    @property
    def label(self) -> str:
        """The name in a few letters, such as "lora+prefix"."""
        return self.name if isinstance(self.name, str) else "+".join(self.name)

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name, as given."""
        return dict(self.model_extra or {})


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        near = did_you_mean(name, OBJECTIVES)
        told = {"known": ", ".join(OBJECTIVES), "near": near}
        raise PydanticCustomError("objective", "{near} It is one of {known}", told)
    return name


ObjectiveName = Annotated[
    str, AfterValidator(_known_objective), WithJsonSchema({"type": "string", "enum": list(OBJECTIVES)})
]


class ObjectiveSpec(BaseModel):
    """What causal-lm learns by instead of the answers' text: a name, then the options of that objective."""

    model_config = STRICT

    name: ObjectiveName
    """distill: what a teacher says of every token; dpo, orpo: of two answers the better one; kto: good and bad answers;
    reward: a model that scores answers."""
    beta: float | None = Field(None, gt=0)
    """How strongly the model is held to the reference; by default that of TRL."""
    loss_type: str | None = None
    """dpo: TRL's name of the loss, such as sigmoid (the default), ipo, hinge or robust."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo: part of the pairs that are taken to be the wrong way round."""
    desirable_weight: float = Field(1.0, gt=0)
    """kto: how much a good answer counts."""
    undesirable_weight: float = Field(1.0, gt=0)
    """kto: how much a bad answer counts."""
    center: float | None = Field(None, gt=0)
    """reward: how strongly scores are kept near 0 (TRL's center_rewards_coefficient)."""
    teacher: PathText | None = None
    """distill: a folder, hub id or .gguf file of the same vocabulary; by default the base itself, not quantized."""
    temperature: float = Field(1.0, gt=0)
    """distill: above 1, what the teacher finds unlikely counts for more."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _weight(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "all" or (number and (0 < value < 1 or (value >= 1 and value % 1 == 0))):
        return value
    raise PydanticCustomError(
        "weight", "it is a share of the training rows between 0 and 1, such as 0.3, a whole number of rows, or all"
    )


Weight = Annotated[
    float | str,
    BeforeValidator(_weight),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "all"}]}),
]


class MixSpec(BaseModel):
    """One more set of training rows: its weight alone, or a mapping of these keys."""

    model_config = STRICT

    weight: Weight = "all"
    """Below 1 its share of the training rows (repeated where it has too few, which is said); from 1 a number of its
    rows, drawn with the seed; all: every row once."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Role to column name, where they are called otherwise than in `train` and not recognised."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""

    @model_validator(mode="before")
    @classmethod
    def _from_weight(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | MixSpec) else {"weight": value}


class AugmentSpec(BaseModel):
    """What training rows go through, drawn anew each time they are seen; held-out rows never do."""

    model_config = STRICT

    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Text: the probability that a token is hidden behind the mask token, or the one for the unknown."""
    token_deletion: float = Field(0.0, ge=0, lt=1)
    """Text: the probability that a token is left out."""
    token_swap: float = Field(0.0, ge=0, lt=1)
    """Text: the probability that a token changes places with the next one."""
    neftune: float | None = Field(None, gt=0)
    """Text: the size of noise on the embeddings (NEFTune's alpha; 5 is usual)."""
    spec_augment: float | None = Field(None, ge=0, lt=1)
    """Recordings: the part of the time that the model's own SpecAugment masks; 0 turns it off."""
    images: list[str | dict[str, _Options]] = Field(default_factory=list)
    """Pictures: transforms of torchvision v2, in order: names, or with options {ColorJitter: {brightness: 0.2}}."""

    @field_validator("images")
    @classmethod
    def _one_name_each(cls, value: list[Any]) -> list[Any]:
        if any(isinstance(one, dict) and len(one) != 1 for one in value):
            raise PydanticCustomError("transforms", "each transform is a name, or one name with its options")
        return value


class DataSpec(BaseModel):
    """Where the examples come from and which column is what."""

    model_config = STRICT

    train: PathText
    """A CSV, TSV, JSON, JSONL, Parquet, Arrow, CoNLL, fastText or text file; a folder with files or folders named train
    and test (shards are joined), one saved by `datasets`, or with one sub-folder of images or recordings a class; or a
    hub id. Conversations as OpenAI, ShareGPT, Alpaca, Dolly, xLAM, CoQA and UltraChat write them, and texts marked in
    doccano, Label Studio, Prodigy or spaCy."""
    test: PathText | None = None
    """The held-out examples; without it, `train`'s own test part is used, or `test_size` of the rows are set aside."""
    mix: dict[str, MixSpec] = Field(default_factory=dict)
    """More training rows: name to weight, such as {chat.jsonl: 0.3, rules.csv: all}. Every row of `train` is used once
    in an epoch, and of the others as many as the weights say; rows are held out of `train` alone."""
    augment: AugmentSpec | None = None
    """What training rows go through each time they are seen, such as {token_deletion: 0.1} or {neftune: 5}."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Role to column name, such as {text: review, label: stars} or {text: body, spans: marks}; recognised by name where
    left out."""
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
    max_seconds: float | None = Field(None, gt=0)
    """Recordings: the longest that is heard whole; by default what the model can take, at most 30 seconds."""
    language: str | None = None
    """Speech recognition with a model of several languages (Whisper): the one that is spoken, by its code: en, de."""
    speech_task: Literal["transcribe", "translate"] | None = None
    """Speech recognition, models of several languages: write what is said (the default), or its English."""

    box_format: Literal["xywh", "xyxy", "xyxy-normalized", "cxcywh-normalized"] | None = None
    """Object detection: how boxes are written. xywh: [left, top, width, height] in pixels, as COCO has them; xyxy:
    [left, top, right, bottom]; normalized: as parts of the picture, c for the centre, as YOLO has them. By default the
    one by which all boxes lie in their pictures; where several do, it has to be said."""
    min_score: float = Field(0.5, ge=0, le=1)
    """Object detection: boxes that are less likely are not shown by `predict`; scores look at all."""

    @field_validator("mix", mode="before")
    @classmethod
    def _each_whole(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str | os.PathLike) else value
        if isinstance(names, list | tuple) and all(isinstance(name, str | os.PathLike) for name in names):
            return {os.fspath(name): "all" for name in names}
        return names

    @field_validator("mix")
    @classmethod
    def _leaves_a_share(cls, value: dict[str, MixSpec]) -> dict[str, MixSpec]:
        shares = sum(one.weight for one in value.values() if isinstance(one.weight, int | float) and one.weight < 1)
        if shares >= 1:
            told = {"sum": f"{shares:g}"}
            raise PydanticCustomError("shares", "the shares add up to {sum}, which leaves none for `train`", told)
        return value

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"train": os.fspath(value)} if isinstance(value, str | os.PathLike) else value


class TrainingSpec(BaseModel):
    """How to train."""

    model_config = STRICT

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
    init: Literal["eva", "corda", "lora-ga", "loftq", "pissa", "olora"] | None = None
    """LoRA: where it starts, instead of at random beside 0. eva, corda and lora-ga look at up to 256 training rows;
    loftq starts with what quantizing has lost; pissa and olora split the weights. The base stays as it is: where a
    start would take a part of it, the adapter has twice the rank, half of which stands still."""
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
    keep_within: float | None = Field(None, ge=0)
    """How much the loss on the rows of `eval.keep` may rise over the base model's, as a part of it: 0.02 is 2 %. The
    checkpoint and the adapter's scale that score best within it are shipped."""
    auto_batch: bool = False
    """Out of memory: halve `batch_size`, double `gradient_accumulation`, and start again."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between two lines of `metrics.jsonl`."""
    log_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(default_factory=list)
    """Trackers that receive the metrics too."""
    samples: int = Field(8, ge=0)
    """Held-out examples whose predictions, base beside tuned, are written to `samples.jsonl`."""


class EvalSpec(BaseModel):
    """What is scored beside the held-out rows."""

    model_config = STRICT

    keep: PathText | None = None
    """Rows of the same task that the training is not about and should not spoil (general text, an earlier job,
    refusals): scored before and after it. A file, a folder or a hub id; of several parts, the held-out one."""
    keep_columns: dict[str, str] = Field(default_factory=dict)
    """Role to column name in the rows of `keep`, where they are called otherwise than in the training data."""
    keep_limit: int | None = Field(None, ge=1)
    """Use at most so many rows of `keep` (drawn with the seed)."""
    judge: PathText | None = None
    """A function of yours that scores written answers, as module:function or file.py:function. It takes a list of rows
    (dicts) and a list of answers, and gives a number for each, the higher the better. Asked before and after training;
    its code runs."""
    judge_limit: int = Field(64, ge=1)
    """Judge at most so many held-out rows (drawn with the seed)."""


class CardSpec(BaseModel):
    """What the model card says, beside what was trained, on what and how well."""

    model_config = STRICT

    samples: bool = False
    """Put the first samples onto the card, which travels with the adapter: they are rows of your data, and answers.
    The run folder has them in `samples.jsonl` in any case."""
