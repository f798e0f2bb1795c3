"""Preference tuning with TRL's DPOTrainer. Its reference is the wrapped model with the adapter off: no second copy.

    python examples/dpo_trl.py                                       # SmolLM2-135M learns to prefer kind reviews
    python examples/dpo_trl.py --model HUB_ID --data pairs.jsonl     # columns: prompt, chosen, rejected

Needs trl. Without --model and --data, examples/assets.py fetches both.
"""

import argparse
from pathlib import Path

import assets
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import adapters_kit as ak
from adapters_kit.training.data import read_rows


def trainer_for(model: str, pairs: Dataset, out: Path, **options) -> DPOTrainer:
    """A trainer ready to run; `options` go to DPOConfig."""
    on_gpu = torch.cuda.is_available()
    wrapped = ak.wrap(ak.load(model), "lora", r=16)
    config = DPOConfig(
        output_dir=str(out), report_to="none", save_strategy="no", bf16=on_gpu, use_cpu=not on_gpu, **options
    )
    return DPOTrainer(model=wrapped, args=config, train_dataset=pairs, processing_class=ak.load_processor(model))


def kind_reviews(reviews: Dataset) -> Dataset:
    """Pairs made of real reviews, columns text and label: a positive one is chosen, a negative one rejected."""
    kind, unkind = (reviews.filter(lambda row, name=name: row["label"] == name) for name in ("positive", "negative"))
    pairs = zip(kind["text"], unkind["text"], strict=False)
    prompt = "Write one sentence about a film."
    return Dataset.from_list([{"prompt": prompt, "chosen": f" {yes}", "rejected": f" {no}"} for yes, no in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file")
    parser.add_argument("--data", help="CSV or JSONL file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/dpo"))
    options = parser.parse_args()
    pairs = read_rows(options.data) if options.data else kind_reviews(read_rows(assets.reviews() / "train.csv"))
    settings = {"max_length": 128, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "logging_steps": 5}
    trainer = trainer_for(
        str(options.model or assets.smollm2()), pairs, options.out, max_steps=options.steps, **settings
    )
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))
    print(f"Adapter: {options.out / 'adapter'}")


if __name__ == "__main__":
    main()
