"""Small bases and trained-looking adapters for the tests of shipping."""

from pathlib import Path

import peft
import torch
import transformers

from tests.support import tiny


def save_base(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A tiny model of family `name`, saved."""
    tiny.build(name).to(dtype).save_pretrained(folder, **options)
    return folder


def disturb(model, scale: float = 0.1, seed: int = 0) -> None:
    """Give every trainable parameter seeded noise: a fresh LoRA is zero and would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)


def train_on(
    base: Path, config: peft.PeftConfig, out: Path, *, kind="AutoModelForCausalLM", scale=0.1, seed=0, **options
):
    """An adapter on a saved base, saved to `out`; returns the live `PeftModel` in eval mode."""
    model = getattr(transformers, kind).from_pretrained(base, **options)
    model = peft.get_peft_model(model, config)
    disturb(model, scale, seed)
    model.save_pretrained(out)
    return model.eval()


def load(folder: Path, kind: str = "AutoModelForCausalLM", dtype: torch.dtype = torch.float32):
    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def gap(one, other) -> float:
    """Largest difference of the first outputs of two models on the same batch, in float32."""
    batch = tiny.inputs(one)
    return (one(**batch)[0].float() - other(**batch)[0].float()).abs().max().item()


LLAMA_LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
