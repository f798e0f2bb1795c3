"""Which model fits on which consumer card: the longest input and the largest batch, by `plan`, from bare configs.

    python benchmarks/cards.py              # all models; writes results/cards.json, prints a table
    python benchmarks/cards.py --models Llama-3.1-8B --cards 24

No weights, no hub: the shapes below are those that the models' makers publish in config.json. Needs a few minutes.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import torch
from cards_table import table

from adapters_kit.anatomy.depth import shortened

CARDS = (8, 12, 16, 24)  # GB, as they are sold
LENGTH = 2048  # of the rows of the largest batch
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8,
          "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}  # fmt: skip
_QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "num_key_value_heads": 8,
         "max_position_embeddings": 40960, "head_dim": 128, "rms_norm_eps": 1e-6}  # fmt: skip


def _shape(hidden: int, inner: int, layers: int, heads: int, tied: bool, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {**_LLAMA, **_shape(2048, 8192, 16, 32, True, head_dim=64)},
    "Llama-3.2-3B": {**_LLAMA, **_shape(3072, 8192, 28, 24, True, head_dim=128)},
    "Llama-3.1-8B": {**_LLAMA, **_shape(4096, 14336, 32, 32, False, head_dim=128)},
    "Qwen3-4B": {**_QWEN, **_shape(2560, 9728, 36, 32, True)},
    "Qwen3-8B": {**_QWEN, **_shape(4096, 12288, 36, 32, False)},
    "Qwen3-14B": {**_QWEN, **_shape(5120, 17408, 40, 40, False)},
    "Gemma-3-12B": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262208,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
        **_shape(3840, 15360, 48, 16, True, head_dim=256),
    },
}
# Published peaks: model, rank, rows, tokens a row, GiB. torchtune's README, LoRA of rank 8 on one RTX 4090, batches of
# two rows of Alpaca (some 200 tokens each, rarely over 512), activations recomputed.
PUBLISHED = {"torchtune, LoRA": ("Llama-3.1-8B", 8, 2, 256, 16.2)}


class Planned:
    """One recipe on the shapes of one model, to be asked about batches: what `plan` does, for several cards at once."""

    def __init__(self, folder: Path, name: str, quantize: str | None, rank: int = 16) -> None:
        from adapters_kit.kernels.fuse import fuse
        from adapters_kit.recipe import Recipe
        from adapters_kit.training.batches import FromLength
        from adapters_kit.training.memory import StepMemory
        from adapters_kit.training.plan import _wrapped
        from adapters_kit.training.resolve import resolve

        path = folder / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
        training = {"batch_size": 1, "gradient_checkpointing": True, "precision": "bf16"}
        fields = {"model": str(path), "task": "causal-lm", "data": "-", "quantize": quantize, "training": training}
        recipe = resolve(Recipe(**fields, method={"name": "lora", "r": rank}), trains=False)
        self.batches = FromLength(recipe, LENGTH)
        self.batches.bare.to(torch.bfloat16)
        self.model = _wrapped(self.batches.bare, recipe)
        self.asked = StepMemory(
            self.model, dtype=torch.bfloat16, checkpointing=True, optimizer="adamw", quantize=quantize, on_gpu=True
        )
        self.known: dict[tuple[int, int], Any] = {}
        self.stack = ExitStack()
        self.stands_for = self.stack.enter_context(shortened(self.model))
        fuse(self.model)

    def memory(self, rows: int, length: int) -> Any:
        """Of a step."""
        if (rows, length) not in self.known:
            batch = self.batches.batch(rows, length)
            self.known[rows, length] = self.asked.of(batch, self.asked.kept(batch, self.stands_for))
        return self.known[rows, length]

    def cell(self, card: int) -> dict[str, int]:
        """Longest input of one row, and largest batch of `LENGTH` tokens."""
        from adapters_kit.training.plan import _largest, room_needed

        room, top = card << 30, min(self.batches.longest, 4096)
        longest = _largest(
            lambda n: room_needed(self.memory(1, n)), [LENGTH // 2, LENGTH, top], room, self.batches.longest
        )
        rows = _largest(lambda n: room_needed(self.memory(n, LENGTH)), (1, 16), room)
        return {"longest": longest, "batch": rows}


def measured(folder: Path, names: list[str], cards: list[int]) -> dict[str, Any]:
    """model -> recipe -> card -> longest input at batch 1, largest batch at `LENGTH` tokens."""
    found: dict[str, Any] = {}
    for name in names:
        for label, quantize in {"lora bf16": None, "qlora": "nf4"}.items():
            planned = Planned(folder, name, quantize)
            found.setdefault(name, {})[label] = {str(card): planned.cell(card) for card in cards}
            planned.stack.close()
            print(f"{name} {label} {found[name][label]}", file=sys.stderr, flush=True)
    return found


def published(folder: Path) -> dict[str, Any]:
    """What others measured beside what `plan` says of the same."""
    found = {}
    for who, (name, rank, rows, length, gib) in PUBLISHED.items():
        planned = Planned(folder, name, None, rank)
        total = planned.memory(rows, length).total
        planned.stack.close()
        found[who] = {"model": name, "rows": rows, "length": length, "published_gib": gib, "planned_gib": total / 2**30}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checked = published(Path(folder))
        found = measured(Path(folder), arguments.models, arguments.cards)
    print(table(found))
    print(json.dumps(checked))
    if arguments.models == list(MODELS) and arguments.cards == list(CARDS):
        common.write(
            "cards", {"environment": common.environment(), "length": LENGTH, "published": checked, "cards": found}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
