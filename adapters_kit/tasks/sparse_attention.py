"""BigBird's sparse attention, whose answer to a row hangs on how long the rows beside it are."""

from __future__ import annotations

from torch import nn

from adapters_kit.tasks.notes import Notes

_SPARSE, _FULL = "block_sparse", "original_full"


def attend_fully(model: nn.Module, name: str, max_length: int, notes: Notes) -> None:
    """Lets BigBird attend from every token to every other; does nothing to models of other kinds.

    Its last block of tokens is seen by all others: of a row beside longer ones that is padding. transformers leaves the
    sparse way by itself, and for good, at the first batch of rows too short for it, so that answers would also hang on
    the batches before.

    Args:
        name: the model's.
        notes: told, where rows may be longer than transformers would attend to fully.
    """
    sparse = [module for module in model.modules() if getattr(module, "attention_type", None) == _SPARSE]
    for module in sparse:
        if callable(change := getattr(module, "set_attention_type", None)):
            change(_FULL)
    config = model.config
    longest = (5 + 2 * getattr(config, "num_random_blocks", 0)) * getattr(config, "block_size", 0)
    if sparse and max_length > longest:
        notes.say(
            f"{name} attends fully (attention_type original_full), not block_sparse, in which a row's answer would "
            f"hang on the rows beside it; memory grows with the square of the length. Rows of up to {longest:,} tokens "
            "are attended to so anyway. Load the base with attention_type='original_full' wherever the adapter is used."
        )
