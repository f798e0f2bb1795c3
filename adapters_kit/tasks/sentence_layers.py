"""The layers that sentence-transformers puts behind a model: they make one vector of the vectors of a text's tokens."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.source import find
from adapters_kit.errors import MissingPackageError, ModelError, gist
from adapters_kit.tasks.notes import Notes

INSTALL = "pip install 'adapters-kit[embeddings]'"
_KNOWN = ("Pooling", "Normalize", "Dense")  # of sentence-transformers; no others are made, whatever a folder names
_MODULES, _LENGTH, _PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"


def losses() -> ModuleType:
    """The losses of sentence-transformers.

    Raises:
        MissingPackageError: it is not installed.
    """
    return _package("sentence_transformers.sentence_transformer.losses")


class SentenceLayers:
    """What follows the model in its folder's modules.json; without that file the mean over a text's tokens.

    Attributes:
        max_length: tokens that the folder cuts texts to; None where it does not say.
    """

    def __init__(self, model: str, width: int, notes: Notes) -> None:
        """Reads the layers.

        Args:
            model: the base, as a recipe names it.
            width: of the model's vectors.
            notes: told of what the folder does not say, and of prompts.

        Raises:
            ModelError: layers of other kinds, or of another width.
            MissingPackageError: sentence-transformers is not installed.
        """
        kinds = _package("sentence_transformers.sentence_transformer.modules")
        self._source = source = find(model)
        self.layers = nn.Sequential()
        named = None if source.gguf_file else self._read(_MODULES)
        for entry in named or ():
            kind, path = str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))
            if path == "" or kind == "Transformer":
                continue
            if kind not in _KNOWN or not str(entry["type"]).startswith("sentence_transformers."):
                raise ModelError(
                    f"{_MODULES} of {source.name} names a layer {entry['type']!r}; {', '.join(_KNOWN)} are known."
                )
            try:
                self.layers.append(getattr(kinds, kind).load(source.location, subfolder=path))
            except Exception as error:  # whatever the fields of a damaged file provoke
                raise ModelError(f"Cannot read the layer {path} of {source.name}: {gist(error)}") from error
        if not any(type(layer).__name__ == "Pooling" for layer in self.layers):
            self.layers.insert(0, kinds.Pooling(width))
            notes.say(f"{source.name} does not say how it makes one vector of a text ({_MODULES}): the mean is taken.")
        pooled = next(layer for layer in self.layers if type(layer).__name__ == "Pooling")
        if pooled.embedding_dimension != width:
            raise ModelError(
                f"The pooling of {source.name} takes vectors of {pooled.embedding_dimension}; the model's have {width}."
            )
        self.layers.requires_grad_(False)
        length = (self._read(_LENGTH) or {}) if not source.gguf_file else {}
        self.max_length = length["max_seq_length"] if isinstance(length.get("max_seq_length"), int) else None
        prompts = ((self._read(_PROMPTS) or {}) if not source.gguf_file else {}).get("prompts") or {}
        if told := {name: text for name, text in prompts.items() if text}:
            listed = ", ".join(f"{name} {text!r}" for name, text in told.items())
            notes.say(f"{source.name} was made for texts with a prompt before them ({listed}): none is added to yours.")

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(texts, width) float32 of (texts, tokens, width) and the tokens' mask."""
        self.layers.to(hidden.device)
        features = {"token_embeddings": hidden.float(), "attention_mask": mask}
        with torch.autocast(hidden.device.type, enabled=False):
            return self.layers(features)["sentence_embedding"].float()

    def save(self, folder: Path, max_length: int) -> None:
        """Writes the layers as sentence-transformers keeps them."""
        named = [{"idx": 0, "name": "0", "path": "", "type": _type("base.modules.transformer.Transformer")}]
        for number, layer in enumerate(self.layers, 1):
            path = f"{number}_{type(layer).__name__}"
            (folder / path).mkdir(exist_ok=True)
            layer.save(str(folder / path))
            named.append({"idx": number, "name": str(number), "path": path, "type": _type_of(layer)})
        (folder / _MODULES).write_text(json.dumps(named, indent=2), encoding="utf-8")
        write_json(folder / _LENGTH, {"max_seq_length": max_length, "do_lower_case": False})

    def _read(self, name: str) -> Any:
        try:
            found = cached_file(self._source.location, name, _raise_exceptions_for_missing_entries=False)
            return json.loads(Path(found).read_text(encoding="utf-8")) if found else None
        except (OSError, ValueError) as error:
            raise ModelError(f"Cannot read {name} of {self._source.name}: {gist(error)}") from error


def _type(path: str) -> str:
    return f"sentence_transformers.{path}"


def _type_of(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"sentence-embedding needs sentence-transformers: {INSTALL}") from error
