"""The arguments of the verbs that ship what was trained; `arguments` has the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from adapters_kit.quantization_table import QUANTIZATIONS
from adapters_kit.verbs import models, shipping

Adder = Callable[..., argparse.ArgumentParser]


def add_shipping(verb: Adder) -> None:
    """Add them.

    Args:
        verb: makes the parser of the verb that a function answers.
    """
    _merging(verb)
    _serving(verb)
    _moving(verb)


def _several(made: argparse.ArgumentParser) -> None:
    """The flags for several adapters."""
    made.add_argument("--weights", nargs="+", type=float, metavar="W", help="a factor for each adapter (default: 1)")
    made.add_argument(
        "--method",
        choices=["sum", "ties", "dare"],
        default="sum",
        help="how several adapters become one: weighted sum, TIES or DARE (default: sum)",
    )
    made.add_argument(
        "--density", type=float, default=0.5, help="share of values that TIES and DARE keep (default: 0.5)"
    )
    made.add_argument("--seed", type=int, default=0, help="of DARE's choice (default: 0)")


def _merging(verb: Adder) -> None:
    made = verb(shipping.merge)
    made.add_argument("adapters", nargs="+", metavar="ADAPTER", help="run or adapter folder; or several")
    made.add_argument("out", metavar="OUT", help="model folder to write; a .gguf file for an adapter on one")
    _several(made)
    made.add_argument("--base", help="base model (default: the one that the adapter names)")
    made.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="dtype of the result (default: the base's)")
    made.add_argument(
        "--quantized",
        choices=QUANTIZATIONS,
        help="what the base was quantized to in training, for an adapter without a record of it",
    )
    made.add_argument("--quantize", choices=QUANTIZATIONS, help="round the result again; prints what the update loses")
    made.add_argument(
        "--verify",
        choices=["sample", "full", "off"],
        default="sample",
        help="compare outputs on 2 batches, or on 16 and every written tensor, or nothing (default: sample)",
    )
    made.add_argument(
        "--calibration",
        metavar="FILE",
        help="LoRA into a .gguf file: text like that which the model will see (default: it writes some itself)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    made.add_argument(
        "--force", action="store_true", help="merge into another base than the adapter's; says what differs"
    )

    made = verb(shipping.combine)
    made.add_argument("adapters", nargs="+", metavar="ADAPTER", help="LoRA run or adapter folders, two or more")
    made.add_argument("out", metavar="OUT", help="adapter folder to write")
    _several(made)
    made.add_argument("--rank", type=int, help="of the result (default: the sum of the ranks, exact for a sum)")
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")


def _serving(verb: Adder) -> None:
    made = verb(models.check)
    made.add_argument("folder", help="run, adapter or model folder")
    made.add_argument(
        "--target",
        choices=["peft", "transformers", "vllm", "sglang", "llama.cpp", "ollama"],
        default="vllm",
        help="what it shall load in (default: vllm)",
    )
    made.add_argument("--max-lora-rank", type=int, default=16, help="vLLM's option of that name (default: 16)")

    made = verb(shipping.prove)
    made.add_argument("url", metavar="URL", help="of an OpenAI-compatible server, such as http://localhost:8000")
    made.add_argument("--adapter", metavar="FOLDER", help="run, adapter or merged folder (default: --model)")
    made.add_argument("--model", metavar="NAME", help="the name that the server knows it by (default: its only one)")
    made.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (default: OPENAI_API_KEY)")
    made.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one answer (default: 120)")


def _moving(verb: Adder) -> None:
    made = verb(shipping.export)
    made.add_argument("source", help="run or adapter folder; for GGUF also a model folder")
    made.add_argument("out", help="folder to write; for GGUF the file")
    made.add_argument("--format", choices=["peft", "gguf", "kv-cache"], default="peft", help="default: peft")
    made.add_argument("--canonical", action="store_true", help="fold all scales into B, alpha = r, one rank")
    made.add_argument("--rank", type=int, help="best approximation of that rank; implies --canonical")
    made.add_argument("--dtype", help="of the written tensors; for GGUF also q8_0, q4_k_m and more")
    made.add_argument("--base", help="base model of a GGUF adapter or a KV cache (default: the one that it names)")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")

    made = verb(shipping.extract)
    made.add_argument("base", help="the base model: folder, .gguf file or hub id")
    made.add_argument("tuned", help="a full fine-tuning of it: folder or hub id")
    made.add_argument("out", help="adapter folder to write")
    made.add_argument("--rank", type=int, default=16, help="of every module, the highest with --energy (default: 16)")
    _energy(made, "by rank alone")
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    made = verb(shipping.convert)
    made.add_argument("source", help="adapter folder, peft's or AdapterHub's")
    made.add_argument("base", help="its base model: folder or hub id")
    made.add_argument("out", help="adapter folder to write")
    made.add_argument("--task", default="causal-lm", help="AdapterHub: the head of the base (default: causal-lm)")
    made.add_argument("--rank", type=int, help="of the plain LoRA (default: the adapter's own, twice where needed)")
    _energy(made, "by rank alone")

    made = verb(shipping.compress)
    made.add_argument("source", help="adapter folder, or a run, which is scored before and after")
    made.add_argument("out", help="adapter folder to write")
    made.add_argument("--rank", type=int, help="the highest that a module may get (default: its own)")
    made.add_argument(
        "--drop-layers", type=int, default=0, metavar="N", help="leave the N lowest layers without; keeps the ranks"
    )
    made.add_argument("--data", help="rows to score before and after (default: a run's held-out ones)")
    _energy(made, "0.99", 0.99)
    made.add_argument("--base", help="of what is no LoRA yet (default: the one that it names)")
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    made = verb(shipping.drop_layers, "drop-layers", takes_keys=True)
    made.add_argument("source", help="base model: folder, .gguf file or hub id")
    made.add_argument("count", nargs="?", type=int, help="how many layers to leave out")
    made.add_argument("--out", help="folder to write (default: the base's name with -short behind it)")
    made.add_argument("--data", help="rows by which they are chosen (default: those before the last layer)")
    made.add_argument("--layers", nargs="+", type=int, metavar="N", help="leave out these, counted from 0")
    made.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    made = verb(shipping.push)
    made.add_argument("folder", help="run folder (its adapter), adapter folder or merged model")
    made.add_argument("repo", help="hub id, OWNER/NAME; made if it is not there")
    made.add_argument("--private", action="store_true", help="make it for its owner only")
    made.add_argument("--license", help="such as apache-2.0, for the card")

    made = verb(shipping.pull)
    made.add_argument("repo", help="hub id, OWNER/NAME")
    made.add_argument("out", help="folder to write")
    made.add_argument("--revision", help="branch, tag or commit")


def _energy(made: argparse.ArgumentParser, told: str, default: float | None = None) -> None:
    """The flag that chooses ranks by what they keep."""
    text = f"choose each rank as the lowest that keeps this share of the update's squared norm (default: {told})"
    made.add_argument("--energy", type=float, metavar="SHARE", default=default, help=text)
