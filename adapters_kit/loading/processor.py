"""The tokenizer, image processor or feature extractor that goes with a model."""

import os
from typing import Any

import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from adapters_kit.artifacts.source import find
from adapters_kit.errors import ModelError, gist
from adapters_kit.loading.reader import trusted


def load_processor(name: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor, feature extractor or combined processor that goes with the model called `name`.

    A tokenizer without a padding token pads with its end-of-text token, so that batches work; the attention mask tells
    padding from text.

    Args:
        name: hub id, local folder, or the path of a .gguf file.

    Raises:
        UnknownNameError: no such local path.
        ModelError: no processor files there.
    """
    source = find(name)
    options = {"trust_remote_code": trust_remote_code, **source.options(revision)}
    try:
        file = source.gguf_file
        auto_class = _tokenizer_class(source.location, file) if file else transformers.AutoProcessor
        with trusted(source):
            processor = auto_class.from_pretrained(source.location, **options)
    except ModelError:
        raise
    except Exception as error:  # tokenizers and transformers raise whatever the fields of a damaged file provoke
        # A speech model without a vocabulary, as pretraining leaves it (HuBERT, WavLM), is asked for one all the same.
        if (extractor := _extractor(source.location, options)) is not None:
            return extractor
        raise ModelError(
            f"No tokenizer or processor for {source.name}: {gist(error)} Copy the processor files of the original "
            "model beside the weights, or name the model they come from."
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(tokenizer, "pad_token", "") is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _extractor(location: str, options: dict[str, Any]) -> Any:
    """The feature extractor alone, for recordings; None where there is none."""
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(location, **options)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _tokenizer_class(location: str, gguf_file: str) -> Any:
    """The class of a GGUF file's tokenizer, as AutoTokenizer finds it: that unpacks the vocabulary once more for it."""
    from adapters_kit.loading.gguf import read_config

    config = read_config(location, gguf_file)
    told_elsewhere = os.path.exists(os.path.join(location, "tokenizer_config.json"))
    if told_elsewhere or getattr(config, "tokenizer_class", None):
        return transformers.AutoTokenizer
    found = TOKENIZER_MAPPING.get(type(config), transformers.PreTrainedTokenizerFast)
    return found if issubclass(found, transformers.PreTrainedTokenizerFast) else transformers.AutoTokenizer
