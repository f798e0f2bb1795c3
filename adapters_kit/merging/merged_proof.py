"""The proof of a merged folder: the adapter's, or one made anew by running base and base + adapter once more."""

from pathlib import Path

import torch

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.dtypes import STORED, name_of
from adapters_kit.artifacts.proof import GENERATES, PROOF, Proof, make_proof, read_proof, runner
from adapters_kit.merging.update import Update
from adapters_kit.merging.verify import reference


def adapters_proof(adapter: Adapter, merged: Path) -> Proof | None:
    """The proof that training left beside the adapter, with the tolerance of the merged weights' dtype."""
    if not (adapter.folder / PROOF).is_file():
        return None
    return read_proof(adapter.folder).as_dtype(_dtype(merged))


def new_proof(update: Update, merged: Path) -> Proof | None:
    """A proof of one token an answer, as every token would read all weights again; None where the folder has no
    tokenizer or the model is no causal language model."""
    from transformers import AutoTokenizer

    bare = update.attached.bare
    if not type(bare).__name__.endswith(GENERATES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError):  # none there, or none that loads
        return None
    if not len(tokenizer) or len(tokenizer) > bare.config.get_text_config().vocab_size:
        return None
    with torch.no_grad(), reference(update.as_trained()) as model:
        tuned = runner(model, "cpu")

        def base(rows: list[list[int]], counts: list[int]) -> list[torch.Tensor]:
            with model.disable_adapter():
                return tuned(rows, counts)

        return make_proof(tuned, base, tokenizer, _dtype(merged), steps=1)


def _dtype(merged: Path) -> str:
    with open_checkpoint(merged) as checkpoint:
        dtypes = [stored.dtype for stored in checkpoint.tensors.values()]
    return name_of(STORED[max(set(dtypes), key=dtypes.count)])
