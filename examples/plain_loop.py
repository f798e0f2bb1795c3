"""A plain PyTorch loop: a wrapped model is an nn.Module whose adapter parameters alone ask for gradients.

    python examples/plain_loop.py                                    # MiniLM on movie reviews, 60 steps on a CPU
    python examples/plain_loop.py --model HUB_ID --data reviews.csv  # columns: text, label

Without --model and --data, examples/assets.py fetches both.
"""

import argparse
from pathlib import Path

import assets
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

import adapters_kit as ak
from adapters_kit.training.data import read_rows


def loop(model: torch.nn.Module, tokenizer, rows: Dataset, labels: list[str], steps: int, rate: float) -> list[float]:
    """Trains for `steps` batches of 16; returns their losses."""

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        texts = [row["text"] for row in batch]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        targets = torch.tensor([labels.index(str(row["label"])) for row in batch])
        return {**encoded, "labels": targets}

    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        for batch in DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate):
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--data", help="CSV or JSONL file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = read_rows(options.data or assets.reviews() / "train.csv")
    labels = sorted({str(label) for label in rows["label"]})
    name = str(options.model or assets.minilm())
    model = ak.wrap(ak.load(name, task="text-classification", labels=labels), "lora", r=8)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    losses = loop(model, ak.load_processor(name), rows, labels, options.steps, rate=1e-3)
    print(f"loss: {sum(losses[:10]) / len(losses[:10]):.3f} -> {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    model.save_pretrained(options.out / "adapter")
    print(f"Adapter: {options.out / 'adapter'}")


if __name__ == "__main__":
    main()
