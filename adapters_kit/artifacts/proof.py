"""`proof.json`: a few prompts with what the base and the tuned model say to them, to be asked again of any server.

The prompts are ours and general, so that no row of the user's travels with the adapter; of them those are kept to which
base and tuned model answer most differently. Every position holds the log-probabilities that both models give to the
likeliest tokens of either, behind the same text: the prompt and the tuned model's own tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_kit.artifacts.chat import render
from adapters_kit.artifacts.files import write_json
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ShippingError

PROOF, FORMAT = "proof.json", 1
ASKED = (
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "Summarise: the meeting was moved from Monday to Thursday because the room was taken.",
    "Is this review good or bad? I would buy it again at once.",
    "Translate into German: the window is open.",
    "def add(a, b):",
    "List three fruits.",
    "My order has not arrived yet. What should I do?",
    "The quick brown fox",
    "Explain in one line why the sky is blue.",
    "Once upon a time",
    "2 + 2 =",
)
KEPT, STEPS, TOP = 4, 6, 8
# Nats. What the same weights differ by from one implementation to the next, by the dtype that they are computed in.
TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 2e-2}

GENERATES = ("ForCausalLM", "LMHeadModel")
"""How the names of classes end whose models can be asked."""

Run = Callable[[list[list[int]], list[int]], list[torch.Tensor]]
"""(rows of token ids, how many last positions of each are wanted) -> log-probabilities, (positions, vocabulary)."""


@dataclass(frozen=True)
class Position:
    """What both models expect next, behind the same text.

    Attributes:
        token: the tuned model's likeliest, as text; the next position follows it.
        tuned, base: token as text -> natural log-probability; the same tokens in both.
    """

    token: str
    tuned: dict[str, float]
    base: dict[str, float]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: as rendered, for a tokenizer that adds its own special tokens.
        ids: its token ids.
        messages: the conversation that was rendered; None for plain text.
        positions: the prompt's last one and those behind each token of the tuned model's answer.
        base_tokens: what the base answers.
    """

    text: str
    ids: list[int]
    messages: list[dict[str, str]] | None
    positions: list[Position]
    base_tokens: list[str]


@dataclass(frozen=True)
class Proof:
    """The content of proof.json; `tolerance` in nats, `dtype` that of the model's weights."""

    dtype: str
    tolerance: float
    prompts: list[Prompt]
    """Texts with what base and tuned model say to them."""

    def write(self, folder: Path) -> Path:
        """Write it into a folder; returns the file."""
        return write_json(folder / PROOF, {"format": FORMAT, **asdict(self)}, indent=1)

    def as_dtype(self, dtype: str) -> "Proof":
        """The same of weights in another dtype: the coarser one's tolerance."""
        return replace(self, dtype=dtype, tolerance=max(self.tolerance, tolerance(dtype)))


def tolerance(dtype: str) -> float:
    """Nats between two implementations of the same weights."""
    return TOLERANCE.get(dtype, 2e-2)


def read_proof(folder: Path) -> Proof:
    """The proof of an adapter or model folder.

    Raises:
        ShippingError: there is none, or it is not one.
    """
    path = folder / PROOF
    if not path.is_file():
        raise ShippingError(
            f"{folder} has no {PROOF}. It is written at the end of train and of merge, for causal language models; "
            "merge the adapter once more to get one."
        )
    try:
        raw = read_json(path)
        prompts = [_prompt(one) for one in raw["prompts"]]
        proof = Proof(str(raw["dtype"]), float(raw["tolerance"]), prompts)
    except ShippingError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ShippingError(f"{path} is not a proof: {type(error).__name__}: {str(error)[:120]}") from None
    if raw.get("format") != FORMAT or not prompts or not all(prompt.positions for prompt in prompts):
        raise ShippingError(f"{path} is not a proof of format {FORMAT}, or is empty. Merge or train again.")
    return proof


def _prompt(raw: dict[str, Any]) -> Prompt:
    def table(values: dict[str, Any]) -> dict[str, float]:
        return {str(token): float(value) for token, value in values.items()}

    positions = [Position(str(one["token"]), table(one["tuned"]), table(one["base"])) for one in raw["positions"]]
    if any(one.tuned.keys() != one.base.keys() for one in positions):
        raise ValueError("base and tuned model are not given for the same tokens")
    messages = raw["messages"]
    if messages is not None:
        messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in messages]
    return Prompt(str(raw["text"]), list(map(int, raw["ids"])), messages, positions, list(map(str, raw["base_tokens"])))


@torch.no_grad()
def make_proof(tuned: Run, base: Run, tokenizer: Any, dtype: str, *, steps: int = STEPS) -> Proof | None:
    """Ask both models.

    Args:
        steps: tokens of each answer; every one is a forward pass of each model.

    Returns:
        None where the tokenizer makes nothing of the prompts.
    """
    asked = [prompt for text in ASKED if (prompt := _rendered(tokenizer, text)) is not None]
    if not asked:
        return None
    rows = [prompt.ids for prompt in asked]
    ones = [1] * len(rows)
    one, other = tuned(rows, ones), base(rows, ones)
    apart = [(p.exp() * (p - q)).sum().item() for p, q in zip(one, other, strict=True)]
    chosen = sorted(sorted(range(len(rows)), key=lambda index: -apart[index])[:KEPT])
    asked, rows = [asked[index] for index in chosen], [rows[index] for index in chosen]
    answers = _greedy(tuned, rows, [one[index] for index in chosen], steps)
    base_answers = _greedy(base, rows, [other[index] for index in chosen], steps)
    told = [row + answer[:-1] for row, answer in zip(rows, answers, strict=True)]
    counts = [steps] * len(told)
    found = []
    for prompt, answer, theirs, p, q in zip(
        asked, answers, base_answers, tuned(told, counts), base(told, counts), strict=True
    ):
        positions = []
        for index in range(steps):
            before = (prompt.ids + answer)[: len(prompt.ids) + index]
            likely = {*p[index].topk(TOP).indices.tolist(), *q[index].topk(TOP).indices.tolist()}
            texts = {token: _text(tokenizer, before, token) for token in sorted(likely)}
            kept = {token: text for token, text in texts.items() if list(texts.values()).count(text) == 1 and text}
            tables = [{text: round(v[index, t].item(), 5) for t, text in kept.items()} for v in (p, q)]
            positions.append(Position(_text(tokenizer, before, answer[index]), *tables))
        base_tokens = [_text(tokenizer, prompt.ids + theirs[:index], token) for index, token in enumerate(theirs)]
        found.append(replace(prompt, positions=positions, base_tokens=base_tokens))
    return Proof(dtype, tolerance(dtype), found)


def ask_again(proof: Proof, run: Run, tokenizer: Any) -> list[list[tuple[str, dict[str, float]]]]:
    """What a model in memory says to a proof's prompts: for each, (token, likeliest tokens -> log-probability) of every
    position, in the words of servers."""
    rows, ones = [prompt.ids for prompt in proof.prompts], [1] * len(proof.prompts)
    steps = max(len(prompt.positions) for prompt in proof.prompts)
    answers = _greedy(run, rows, run(rows, ones), steps)
    told = [row + answer[:-1] for row, answer in zip(rows, answers, strict=True)]
    said = []
    for row, answer, values in zip(rows, answers, run(told, [steps] * len(told)), strict=True):
        positions = []
        for index, token in enumerate(answer):
            before = row + answer[:index]
            likely = values[index].topk(min(4 * TOP, values.shape[-1])).indices.tolist()
            table = {_text(tokenizer, before, one): values[index, one].item() for one in reversed(likely)}
            positions.append((_text(tokenizer, before, token), table))
        said.append(positions)
    return said


def _greedy(run: Run, rows: Sequence[list[int]], first: Sequence[torch.Tensor], steps: int) -> list[list[int]]:
    """The likeliest tokens of each row, `steps` of them; `first` holds the first position's."""
    answers = [[int(values[-1].argmax())] for values in first]
    for _ in range(steps - 1):
        whole = [row + answer for row, answer in zip(rows, answers, strict=True)]
        for answer, values in zip(answers, run(whole, [1] * len(whole)), strict=True):
            answer.append(int(values[-1].argmax()))
    return answers


def _text(tokenizer: Any, before: list[int], token: int) -> str:
    """A token as it adds to the text before it, which is how servers name it; empty for a part of a character."""
    start = tokenizer.decode(before[-4:])
    whole = tokenizer.decode([*before[-4:], token])
    text = whole[len(start) :] if whole.startswith(start) else tokenizer.decode([token])
    return "" if "\N{REPLACEMENT CHARACTER}" in text else str(text)


def _rendered(tokenizer: Any, asked: str) -> Prompt | None:
    """A prompt as the tokenizer's chat template writes it, or as plain text where there is none."""
    messages = [{"role": "user", "content": asked}] if getattr(tokenizer, "chat_template", None) else None
    if messages is None:
        ids = list(tokenizer(asked)["input_ids"])
        return Prompt(asked, ids, None, [], []) if ids else None
    text = render(tokenizer, messages, prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = tokenizer.bos_token or ""
    if start and text.startswith(start) and list(tokenizer(text)["input_ids"]) != ids:
        text = text.removeprefix(start)  # the server's tokenizer puts it there by itself
    return Prompt(text, ids, messages, [], []) if ids else None


def runner(model: nn.Module, device: torch.device | str | None = None) -> Run:
    """A causal language model as `make_proof` asks it: rows padded on the right, one forward pass."""

    def run(rows: list[list[int]], counts: list[int]) -> list[torch.Tensor]:
        longest = max(map(len, rows))
        place = device if device is not None else next(model.parameters()).device
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device=place)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=place)
            mask[index, : len(row)] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits  # (rows, virtual tokens + longest, vocabulary)
        ahead = logits.shape[1] - longest
        return [
            logits[index, ahead + len(row) - count : ahead + len(row)].float().log_softmax(-1).cpu()
            for index, (row, count) in enumerate(zip(rows, counts, strict=True))
        ]

    return run
