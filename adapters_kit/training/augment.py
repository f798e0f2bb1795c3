"""What training rows go through anew each time they are seen (`data.augment`): never held-out rows, never what is kept.

drawn by torch's generator, which a resumed run restores, so that it sees what the whole run would have seen
tokens    hidden, left out, or swapped with the next one; special tokens stay, and what is learned stays
images    any transforms of torchvision v2
noise on embeddings (NEFTune) is transformers', masked spectra (SpecAugment) are the model's own
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn, randint

from adapters_kit.errors import MissingPackageError, RecipeError, did_you_mean
from adapters_kit.recipe import Recipe
from adapters_kit.recipe_sections import AugmentSpec
from adapters_kit.task_table import TASKS
from adapters_kit.tasks.base import IGNORED, Features, Task
from adapters_kit.tasks.images import open_image

_TOKENS = ("token_dropout", "token_deletion", "token_swap")


class Augment:
    """What is done to the features of a batch before the task makes tensors of them.

    Raises:
        RecipeError: what the tokenizer or the model has not.
    """

    def __init__(self, spec: AugmentSpec, task: Task, model: nn.Module) -> None:
        self.spec = spec
        self.beside = TASKS[task.recipe.task].beside_tokens or ()
        self.images = transforms_of(spec) if spec.images else None
        processor = getattr(task.processor, "tokenizer", task.processor)
        self.special = np.asarray(getattr(processor, "all_special_ids", None) or [-1])
        self.hidden = getattr(processor, "mask_token_id", None)
        if self.hidden is None and getattr(processor, "unk_token_id", None) != getattr(processor, "eos_token_id", None):
            self.hidden = getattr(processor, "unk_token_id", None)
        if spec.token_dropout and self.hidden is None:
            raise RecipeError(
                [
                    f"data.augment.token_dropout: the tokenizer of {task.recipe.model} has neither a mask token nor "
                    "one for the unknown that could stand in a token's place. Take token_deletion or token_swap."
                ]
            )
        if spec.spec_augment is not None:
            _mask_spectra(model, spec.spec_augment, task.recipe.model)

    def __call__(self, features: Features) -> Features:
        """The features of a batch, changed; the ones given stay as they are."""
        if self.images is not None:
            return [{**one, "image": self.images(open_image(one["image"], one["row"]))} for one in features]
        if not any(getattr(self.spec, name) for name in _TOKENS):
            return features
        return [self._tokens(one) for one in features]

    def _tokens(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        draw = np.random.default_rng(int(randint(2**62, ())))
        ids = np.array(feature["input_ids"])
        beside = {key: np.asarray(feature[key]) for key in ("input_ids", *self.beside) if key in feature}
        free = ~np.isin(ids, self.special)
        if (labels := beside.get("labels")) is not None:  # what is learned from stays whole
            free &= labels == IGNORED
        kept = np.arange(len(ids))
        if self.spec.token_deletion:
            gone = free & (draw.random(len(ids)) < self.spec.token_deletion)
            if gone.sum() == free.sum() and len(gone) and free.any():
                gone[np.flatnonzero(free)[0]] = False  # something is left to be read
            kept = kept[~gone]
        if self.spec.token_swap:
            at = 0
            while at + 1 < len(kept):
                pair = kept[at], kept[at + 1]
                if free[pair[0]] and free[pair[1]] and draw.random() < self.spec.token_swap:
                    kept[at], kept[at + 1] = kept[at + 1], kept[at]
                    at += 1
                at += 1
        made = {**feature, **{key: value[kept] for key, value in beside.items()}}
        if self.spec.token_dropout:
            hide = free[kept] & (draw.random(len(kept)) < self.spec.token_dropout)
            made["input_ids"] = np.asarray(made["input_ids"], np.int64).copy()
            made["input_ids"][hide] = self.hidden
        return made


def augment_of(recipe: Recipe, task: Task, model: nn.Module) -> Callable[[Features], Features] | None:
    """What the recipe wants done to training batches; None for nothing but noise, which the loop adds itself."""
    spec = recipe.data.augment
    return None if spec is None else Augment(spec, task, model)


def check_augment(recipe: Recipe, task: type[Task]) -> None:
    """Refuses what the recipe's task has no rows for, before they are read.

    Raises:
        RecipeError, MissingPackageError: with what to do.
    """
    spec = recipe.data.augment
    if spec is None:
        return
    problems = []
    by = f"{recipe.task} by {recipe.objective.name}" if recipe.objective else recipe.task
    for name in _TOKENS:
        if getattr(spec, name) and (TASKS[recipe.task].beside_tokens is None or recipe.objective):
            problems.append(f"data.augment.{name}: the rows of {by} hang on the place of every token: leave it out.")
        elif getattr(spec, name) and recipe.training.packing:
            problems.append(f"data.augment.{name}: packed rows hang on the place of every token: set packing: false.")
    if spec.images and recipe.task != "image-classification":
        problems.append(f"data.augment.images: it is for image-classification, and the task is {recipe.task}.")
    if spec.spec_augment is not None and "audio" not in {role for needs in task.needs for role in needs}:
        problems.append(f"data.augment.spec_augment: it is for recordings, and the task is {recipe.task}.")
    if spec.neftune is not None and {"image", "audio"} & {role for needs in task.needs for role in needs}:
        problems.append(
            f"data.augment.neftune: it is noise on the embeddings of tokens, which {recipe.task} has none of."
        )
    if problems:
        raise RecipeError(problems)
    if spec.images:
        transforms_of(spec)


def transforms_of(spec: AugmentSpec) -> Callable[[Any], Any]:
    """The transforms of torchvision v2 that are named, one after the other.

    Raises:
        MissingPackageError: torchvision cannot be loaded.
        RecipeError: a name that it does not have, or options that it does not take.
    """
    try:
        v2: Any = importlib.import_module("torchvision.transforms.v2")
    except Exception as error:  # its wheels may want libraries that are not here
        raise MissingPackageError(
            f"data.augment.images needs torchvision ({type(error).__name__}: {error}): "
            "pip install 'adapters-kit[images]'"
        ) from error
    made = []
    for one in spec.images:
        named, options = next(iter(one.items())) if isinstance(one, dict) else (one, {})
        kind = getattr(v2, named, None)
        if not isinstance(kind, type):
            known = [name for name, value in vars(v2).items() if isinstance(value, type)]
            raise RecipeError([f"data.augment.images: torchvision has no {named!r}. {did_you_mean(named, known)}"])
        try:
            made.append(kind(**options))
        except (TypeError, ValueError) as error:
            raise RecipeError([f"data.augment.images: {named} cannot be made with {options}: {error}"]) from error
    return v2.Compose(made)


def _mask_spectra(model: nn.Module, part: float, name: str) -> None:
    config: Any = model.config
    if not hasattr(config, "apply_spec_augment") or not hasattr(config, "mask_time_prob"):
        raise RecipeError(
            [f"data.augment.spec_augment: {name} ({config.model_type}) has no SpecAugment: leave it out."]
        )
    config.apply_spec_augment, config.mask_time_prob, config.mask_feature_prob = part > 0, part, 0.0
