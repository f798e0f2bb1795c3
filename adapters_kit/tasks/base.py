"""What every task gives: which columns it needs, how rows become tensors, how predictions are made and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from adapters_kit.artifacts.files import write_json
from adapters_kit.errors import ModelError
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.encoded import Encoded
from adapters_kit.tasks.generation import positions
from adapters_kit.tasks.notes import Notes
from adapters_kit.tasks.rows import one_row, texts_in_parts
from adapters_kit.tasks.sparse_attention import attend_fully
from adapters_kit.tasks.special_ids import check_special
from adapters_kit.tasks.streaming import answer, pieces

IGNORED = -100  # the label of positions that no loss counts (PyTorch's ignore_index)
Features = Sequence[dict[str, Any]]


class Task:
    """One task on one data set. `fit` looks at the rows, `bind` at the model; then everything else works.

    Attributes:
        columns: role to column name.
        labels: names of the classes in the order of the model's outputs; None where a task has none.
        processor: the tokenizer or image processor.
        notes: what was done to the rows that nobody asked for: cut, left out, guessed.
        n_best: answers of each row that `predict` gives, where more than the best are asked for.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[tuple[str, ...], ...]]
    """Alternatives; each is a set of roles that is enough."""
    asks: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Alternatives to predict from, where they are others than what is needed less the targets."""
    optional: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[tuple[str, ...]] = ("label",)
    """Roles that hold what is to be predicted."""
    metric: str = "loss"
    """The score by which evaluations are compared."""
    higher_is_better: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    """Whether an answer is text that the model writes, so that `stream` works."""

    own_loss: ClassVar[bool] = False
    """Whether the loss is the task's, since the model's forward pass gives none."""
    asks_base: ClassVar[bool] = False
    """Whether `refer` asks the model as it is without an adapter."""

    unplanned: tuple[str, ...] = ()
    """Parts of a batch whose values a model looks at, which a plan does not have; they weigh next to nothing."""

    def __init__(
        self, recipe: Recipe, columns: Mapping[str, str], labels: list[str] | None = None, notes: Notes | None = None
    ) -> None:
        self.recipe = recipe
        self.columns = dict(columns)
        self.labels = labels
        self.notes = notes if notes is not None else Notes()
        self.processor: Any = None
        self.max_length = recipe.training.max_length or 512
        self.n_best = 1
        self.embedded: int | None = None  # how many tokens the model has embeddings for

    @classmethod
    def refuse(cls, data: Dataset, given: Mapping[str, str]) -> None:
        """Refuses data that is made for another task, before columns are recognised; `given` is what the user mapped.

        Raises:
            DataError: with what to do.
        """

    @property
    def target(self) -> str:
        """The column that holds what is to be predicted."""
        return next(self.columns[role] for role in self.targets if role in self.columns)

    def fit(self, train: Dataset, test: Dataset | None) -> None:
        """Checks the rows and learns what they say about the task (the classes). Raises DataError."""

    def unlabelled(self, data: Dataset) -> Sequence[int] | np.ndarray:
        """Numbers of the rows that do not say what is to be predicted: nothing to learn from, nothing to score by."""
        return []

    def found(self) -> dict[str, Any]:
        """Recipe keys that `fit` and `bind` have found out, by dotted name: what the same run needs again."""
        return {"labels": self.labels, "data.columns": self.columns, "training.max_length": self.max_length}

    def strata(self, data: Dataset) -> Sequence[Any] | None:
        """One class per row for a stratified split, or None."""
        return None

    def groups(self, data: Dataset) -> Sequence[Any] | np.ndarray | None:
        """What rows have in common that are held out together or not at all, one per row; None: each by itself."""
        return None

    def bind(self, processor: Any, model: nn.Module) -> None:
        """Takes the processor and the limits of the model."""
        self.processor = processor
        self.longest = longest_input(processor, model)
        self.max_length = self.recipe.training.max_length or min(512, self.longest)
        if self.max_length > self.longest:
            raise ModelError(
                f"training.max_length is {self.max_length}; {self.recipe.model} takes at most {self.longest} tokens."
            )
        self.embedded = embedded(model)
        attend_fully(model, self.recipe.model, self.max_length, self.notes)
        check_special(model, self.recipe.model, self.embedded, self.notes)
        self._pad_with_what_is_embedded()
        config = model.config
        if getattr(config, "pad_token_id", None) is None and getattr(processor, "pad_token_id", None) is not None:
            # Models look for it: where the last token of a row is, what stands for a label that no loss counts.
            config.pad_token_id = processor.pad_token_id
        self.adapt(model)

    def _pad_with_what_is_embedded(self) -> None:
        """Takes another padding token where the tokenizer's is one of those that were added behind the embeddings."""
        tokens, pad = self.processor, getattr(self.processor, "pad_token_id", None)
        if self.embedded is None or pad is None or pad < self.embedded:
            return
        before = tokens.pad_token
        special = (tokens.eos_token_id, tokens.unk_token_id, tokens.bos_token_id, 0)
        tokens.pad_token = tokens.convert_ids_to_tokens(next(i for i in special if i is not None and i < self.embedded))
        self.notes.say(
            f"The tokenizer's padding token {before!r} (number {pad}) is none of the {self.embedded:,} tokens that the "
            f"model has embeddings for: {tokens.pad_token!r} pads instead."
        )

    def check_ids(self, features: Features) -> None:
        """Refuses tokens that the model has no embedding for.

        Raises:
            ModelError: with the first such token, its row, and what to do.
        """
        size = self.embedded
        if size is None or not hasattr(self.processor, "__len__") or len(self.processor) <= size:
            return
        for feature in features:
            keys = ("input_ids", "labels") if self.generates else ("input_ids",)
            for token in (max(feature[key], default=0) for key in keys if key in feature):
                if token >= size:
                    row = f" (row {feature['row'] + 1})" if "row" in feature else ""
                    raise ModelError(
                        f"The token {self.processor.convert_ids_to_tokens(int(token))!r}{row} has the number {token}, "
                        f"and {self.recipe.model} has embeddings for {size:,}. Take the tokenizer that belongs to the "
                        "model, or give the model more embeddings before: "
                        "model.resize_token_embeddings(len(tokenizer)), and save both as the base."
                    )

    def adapt(self, model: nn.Module) -> None:
        """Sets what the task needs in a model's config."""

    def training_features(self, features: Features) -> Features:
        """What one training row is made of; packing joins several examples."""
        self.check_ids(features)
        return features

    def encode(self, data: Dataset, *, answers: bool = True) -> Features:
        """One dict of arrays per row; `row` is its number in `data`. Without `answers` targets may be absent."""
        raise NotImplementedError

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """A padded batch."""
        raise NotImplementedError

    def collate_training(self, features: Features) -> dict[str, torch.Tensor]:
        """A batch to train on; differs from `collate` where training draws at random or packs."""
        return self.collate(features)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of a batch: what the model's forward pass gives, but with `own_loss`."""
        return model(**batch).loss

    def refer(self, model: nn.Module, features: Features, batch_size: int) -> None:
        """Asks the model as it is before training what learning or scores are measured from, and keeps it."""

    def write_beside(self, adapter: Path, model: nn.Module) -> None:
        """Writes what others need beside the weights: where answers stop, for whoever generates with them."""
        ends = getattr(model, "generation_config", None) if self.generates else None
        if ends is not None:
            write_json(adapter / "generation_config.json", ends.to_diff_dict())

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """What the model says about each example of a batch; the items are what `score` and `show` read."""
        raise NotImplementedError

    def predict(self, model: nn.Module, data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """The model's answer to every row, as a user wants to see it; the target columns may be absent."""
        features = self.encode(data, answers=False)
        results = self.run(model, features, batch_size)
        return [
            {**self.show(result, data[feature["row"]]), **self.likeliest(result)}
            for result, feature in zip(results, features, strict=True)
        ]

    def likeliest(self, result: Any) -> dict[str, Any]:
        """`best`: the `n_best` classes with their probabilities, best first; nothing where only one is asked for."""
        labels = self.labels or []
        if self.n_best == 1 or np.shape(result) != (len(labels),):
            return {}
        order = np.argsort(-np.asarray(result), kind="stable")[: self.n_best]
        return {"best": [{"label": labels[index], "score": round(float(result[index]), 6)} for index in order]}

    @staticmethod
    def answered(found: str | list[dict[str, Any]]) -> dict[str, Any]:
        """`answer`, and where several were asked for `best`: each with its score, best first."""
        return {"answer": found} if isinstance(found, str) else {"answer": found[0]["answer"], "best": found}

    def stream(self, model: nn.Module, row: Mapping[str, Any]) -> Iterator[str]:
        """The model's answer to one row while it is being written; joined, what `predict` gives as `answer`."""
        (feature,) = self.encode(one_row(row), answers=False)
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate([feature]).items() if name != "row"}

        def generate(**options: Any) -> None:
            with torch.no_grad(), autocast(model, device):
                self.generate(model, batch, **options)

        return answer(pieces(self.processor, generate))

    def generate(self, model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> list[str]:
        """What the model writes for each example of a batch; `options` go to `model.generate`."""
        raise NotImplementedError

    def run(
        self,
        model: nn.Module,
        features: Features,
        batch_size: int,
        step: Callable[[nn.Module, dict[str, torch.Tensor]], list[Any]] | None = None,
        collate: Callable[[Features], dict[str, torch.Tensor]] | None = None,
    ) -> list[Any]:
        """`step` over all features in batches of similar length; results in the order of the features.

        Under a launcher with several processes every process takes its share of the batches and gets all results.
        """
        step, collate = step or self.step, collate or self.collate
        if isinstance(model, DistributedDataParallel):  # hides the model's config and methods; each answers by itself
            model = model.module
        self.check_ids(features)
        state = PartialState()
        order = np.argsort(-self.lengths(features), kind="stable")
        starts = list(range(0, len(order), batch_size))
        # Every process runs the model equally often: a sharded forward is a meeting of all of them.
        starts += starts[-1:] * (-len(starts) % state.num_processes)
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        found: list[Any] = [None] * len(order)
        mine: list[int] = []
        try:
            with torch.no_grad(), autocast(model, device):
                for start in starts[state.process_index :: state.num_processes]:
                    rows = order[start : start + batch_size].tolist()
                    batch = {k: v.to(device) for k, v in collate([features[i] for i in rows]).items() if k != "row"}
                    for row, result in zip(rows, step(model, batch), strict=True):
                        found[row] = result
                    mine += rows if state.num_processes > 1 else []
        finally:
            model.train(was_training)
        for row, result in gather_object([(row, found[row]) for row in mine]):
            found[row] = result
        return found

    def score(self, results: Sequence[Any], features: Features) -> dict[str, float]:
        """The metrics; `results` and `features` are in the same order."""
        raise NotImplementedError

    def show(self, result: Any, row: Mapping[str, Any]) -> dict[str, Any]:
        """A prediction as a user wants to see it."""
        raise NotImplementedError

    def length(self, feature: Mapping[str, Any]) -> int:
        """Tokens of one example, for grouping."""
        return len(feature["input_ids"]) if "input_ids" in feature else 1

    def lengths(self, features: Features) -> np.ndarray:
        """`length` of every example, (examples,) int32."""
        if isinstance(features, Encoded) and type(self).length is Task.length and features.holds("input_ids"):
            return features.lengths("input_ids")
        return np.fromiter((self.length(feature) for feature in features), np.int32, len(features))

    def texts(self, data: Dataset, role: str) -> Iterator[str]:
        """The strings of a role's column, checked to be strings."""
        return strings(data, self.columns[role], role)


def strings(data: Dataset, column: str, role: str) -> Iterator[str]:
    """A column of text, one after the other.

    Raises:
        DataError: numbers, lists or missing values, with the first row concerned.
    """
    for _, texts in texts_in_parts(data, column, role):
        yield from texts


def outputs_of(model: nn.Module) -> list[str]:
    """The names of a classifier's outputs, in their order, as its config has them."""
    return [model.config.id2label[index] for index in sorted(model.config.id2label)]


def embedded(model: nn.Module) -> int | None:
    """How many tokens a model has embeddings for; None for one without such a table."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None


def longest_input(processor: Any, model: nn.Module) -> int:
    """Tokens that the model can take, from its positions and its tokenizer; huge if neither says."""
    limit = getattr(processor, "model_max_length", None)
    return min(positions(model), limit if isinstance(limit, int) and limit > 0 else 10**9)


def same_padding(processor: Any, model: nn.Module, name: str) -> None:
    """Makes the tokenizer's padding token the model's too.

    A classifier over a decoder reads the last token that is not padding, by the model's config. If the tokenizer pads
    with another one, a row's answer depends on the rows beside it.

    Raises:
        ModelError: a decoder whose tokenizer has no token to pad with.
    """
    text = model.config.get_text_config()
    own = getattr(text, "pad_token_id", None)
    if processor.pad_token_id is None and own is not None and own >= 0:  # -1 means none, as in the first LLaMA
        processor.pad_token = processor.convert_ids_to_tokens(own)
    if processor.pad_token_id is not None:
        text.pad_token_id = processor.pad_token_id
    else:
        raise ModelError(
            f"The tokenizer of {name} has no padding token, no end-of-text token to pad with, and the model names "
            "none. Set pad_token in its tokenizer_config.json."
        )


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, side: str = "right") -> torch.Tensor:
    """Rows of different length as one int64 tensor (rows, longest)."""
    tensors = [torch.as_tensor(np.asarray(row, dtype=np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def pad_inputs(features: Features, processor: Any, side: str = "right") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and, where the tokenizer makes them, token_type_ids of a batch.

    A row without any token, as an empty text has where a tokenizer adds none, gets one: a model reads something.
    """
    ids = [feature["input_ids"] if len(feature["input_ids"]) else [first_token(processor)] for feature in features]
    batch = {
        "input_ids": pad(ids, processor.pad_token_id or 0, side),
        "attention_mask": pad([np.ones(len(row), dtype=np.int64) for row in ids], 0, side),
    }
    if "token_type_ids" in features[0]:
        types = [row if len(row) else [0] for row in (feature["token_type_ids"] for feature in features)]
        batch["token_type_ids"] = pad(types, 0, side)
    return batch


def first_token(tokenizer: Any) -> int:
    """The token that stands where there is no other: of the beginning, the end, or padding."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in special if token is not None), 0)


def of_the_text(logits: torch.Tensor, length: int) -> torch.Tensor:
    """The outputs at the text's own tokens: (rows, length, …). Virtual tokens, as prompt tuning puts before a text,
    come first and have outputs too."""
    return logits[:, logits.shape[1] - length :]


def compact(ids: Sequence[int]) -> np.ndarray:
    """Token ids at 4 bytes each."""
    return np.asarray(ids, dtype=np.int32)


def autocast(model: nn.Module, device: torch.device) -> torch.autocast:
    """16-bit arithmetic for a model held in 16 bits, whose adapter parameters are fp32; nothing for fp32 models."""
    kinds = {parameter.dtype for parameter in model.parameters()} & {torch.bfloat16, torch.float16}
    return torch.autocast(device.type, dtype=next(iter(kinds), None), enabled=bool(kinds))
