"""One step of a method on the pretended card: what it asks of it, and whether its numbers are those of a CPU.

python -m tests.support.pretended.steps llama bert     prints a line of JSON: "family method" -> what was seen
"""

import tests.support.pretended.card as pretended  # isort: skip  first of all

import json
import sys
from typing import Any

import torch

import adapters_kit as ak
from adapters_kit.kernels.cross_entropy import chunked_loss
from adapters_kit.quantization import bnb_config, keep_layout, quantizable, quantize_in_place
from tests.support import tiny

METHODS: dict[str, dict[str, Any]] = {
    "nothing": {"method": None},
    "peft lora": {"method": "lora", "fuse": False},
    "lora": {"method": "lora"},
    "lora dropout": {"method": "lora", "lora_dropout": 0.1},
    "lora chunked": {"method": "lora", "chunked": True},
    "lora cheap": {"method": "lora", "chunked": True, "recompute": "cheap"},
    "lora checkpointing": {"method": "lora", "checkpointing": True},
    "lora packed": {"method": "lora", "packed": True},
    "lora nf4": {"method": "lora", "quantize": "nf4"},
    "peft lora nf4": {"method": "lora", "quantize": "nf4", "fuse": False},
    "dora": {"method": "dora"},
    "peft dora": {"method": "dora", "fuse": False},
    "dora nf4": {"method": "dora", "quantize": "nf4"},
    "rslora": {"method": "rslora"},
    "adalora": {"method": "adalora", "total_step": 100},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera"},
    "oft": {"method": "oft"},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "prefix eager": {"method": "prefix", "attention": "eager"},
    "prefix checkpointing": {"method": "prefix", "checkpointing": True},
    "prefix projection": {"method": "prefix", "prefix_projection": True},
    "prefix packed": {"method": "prefix", "packed": True},
    "houlsby": {"method": "houlsby"},
    "pfeiffer": {"method": "pfeiffer"},
    "parallel": {"method": "parallel"},
    "adapterplus": {"method": "adapterplus"},
    "compacter": {"method": "compacter"},
    "mam": {"method": "mam"},
    "unipelt": {"method": "unipelt"},
    "lora and prefix": {"method": ["lora", "prefix"]},
}
FEW = ("nothing", "lora", "lora nf4", "dora", "prefix", "houlsby", "mam")
LENGTH = 12


class NotForThis(Exception):
    """A case that the family does not have."""


def made(family: str, case: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Model and batch, on the CPU."""
    options = dict(case)
    method, quantize = options.pop("method"), options.pop("quantize", None)
    chunked, packed = options.pop("chunked", False), options.pop("packed", False)
    checkpointing, attention = options.pop("checkpointing", False), options.pop("attention", None)
    kind = tiny.FAMILIES[family].kind
    if (packed or chunked) and kind != "decoder":
        raise NotForThis
    torch.manual_seed(0)
    model = tiny.build(family)
    if quantize:
        quantize_in_place(model, quantizable(model), bnb_config(quantize))
        keep_layout(model)
    if attention:
        model.set_attn_implementation(attention)
    batch = tiny.inputs(model, batch=2, length=LENGTH, labels=True, padding=None if packed else "right")
    if packed:
        batch.pop("attention_mask", None)
        batch["position_ids"] = (torch.arange(LENGTH) % 5)[None].repeat(2, 1)
    if method is None:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        model = ak.wrap(model, method, **options)
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            torch.manual_seed(number)
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    if chunked:
        chunked_loss(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind == "decoder" and method != "prompt":
        model.config.use_cache = False
    return model, batch


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of all that is trained, on the CPU; taken away from the model."""
    found = {name: p.grad.cpu().float() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def seen(family: str, name: str, card: pretended.Card) -> dict[str, Any]:
    """What one step of bf16 training asks of the card, and how far its float32 numbers are from a CPU's."""
    case = METHODS[name]
    model, batch = made(family, case)
    model.train()
    torch.manual_seed(7)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.to("cuda")
    batch = {key: value.to("cuda") for key, value in batch.items()}
    away = [
        key for key, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.device != pretended.HERE
    ]
    torch.manual_seed(7)
    model(**batch).loss.backward()
    found = gradients(model)
    size = max((grad.abs().max().item() for grad in expected.values()), default=1.0)
    off = max(((found[key] - grad).abs().max().item() / size for key, grad in expected.items()), default=0.0)
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16()
    card.forget()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    launches, waits = sum(card.launches.values()), {f"{what} {where}": n for (what, where), n in card.waits.items()}
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        model(**batch)
        if tiny.FAMILIES[family].kind == "decoder" and case.get("packed") is None:
            model.config.use_cache = True
            model.generate(input_ids=batch["input_ids"][:1, :5], max_new_tokens=2, do_sample=False, pad_token_id=0)
    lost = sorted(set(expected) ^ set(found))
    return {"launches": launches, "waits": waits, "off": off, "away": away, "lost": lost}


def main(families: list[str]) -> None:
    """Prints what was seen of every method on the first family, and of a few on the others."""
    result: dict[str, Any] = {}
    with pretended.present() as card:
        for family in families:
            for name in METHODS if family in (families[0],) else FEW:
                try:
                    result[f"{family} {name}"] = seen(family, name, card)
                except NotForThis:
                    continue
                except Exception as error:  # told by the test, beside all others
                    result[f"{family} {name}"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print("SEEN" + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
