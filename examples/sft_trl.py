"""Supervised fine-tuning with TRL's SFTTrainer, which takes a wrapped model as it is.

    python examples/sft_trl.py                                       # SmolLM2-135M on movie reviews, 20 steps on a CPU
    python examples/sft_trl.py --model HUB_ID --data rows.jsonl      # columns: text, or prompt and completion

Needs trl. Without --model and --data, examples/assets.py fetches both.
"""

import argparse
from pathlib import Path

import assets
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import adapters_kit as ak
from adapters_kit.training.data import read_rows


def trainer_for(model: str, rows: Dataset, out: Path, **options) -> SFTTrainer:
    """A trainer ready to run; `options` go to SFTConfig."""
    on_gpu = torch.cuda.is_available()
    wrapped = ak.wrap(ak.load(model), "lora", r=16)
    config = SFTConfig(
        output_dir=str(out), report_to="none", save_strategy="no", bf16=on_gpu, use_cpu=not on_gpu, **options
    )
    return SFTTrainer(model=wrapped, args=config, train_dataset=rows, processing_class=ak.load_processor(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file")
    parser.add_argument("--data", help="CSV or JSONL file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/sft"))
    options = parser.parse_args()
    rows = read_rows(options.data or assets.reviews() / "train.csv")
    rows = rows.remove_columns([name for name in rows.column_names if name not in ("text", "prompt", "completion")])
    settings = {"max_length": 128, "per_device_train_batch_size": 4, "learning_rate": 2e-4, "logging_steps": 5}
    trainer = trainer_for(
        str(options.model or assets.smollm2()), rows, options.out, max_steps=options.steps, **settings
    )
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))  # a peft adapter: ak.merge, ak.predict and peft load it
    print(f"Adapter: {options.out / 'adapter'}")


if __name__ == "__main__":
    main()
