"""prove(): what answers behind an address, the tuned model or something else?

Servers answer from the base, or through another template, without a word. `proof.json` holds what base and tuned model
say to a few prompts; the server is asked the same, and its log-probabilities are compared with both: see `evidence`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_kit.artifacts.adapter import adapter_folder
from adapters_kit.artifacts.proof import PROOF, Prompt, Proof, ask_again, read_proof, runner
from adapters_kit.errors import ShippingError
from adapters_kit.serving.client import Reply, Server
from adapters_kit.serving.evidence import Measured, measure

TUNED, BASE, TEMPLATE, QUANTIZED, UNKNOWN = (
    "the tuned model", "the base", "another template", "quantized", "cannot tell",
)  # fmt: skip
STATUS = {TUNED: 0, BASE: 3, TEMPLATE: 4, QUANTIZED: 5, UNKNOWN: 6}


@dataclass
class ProofReport:
    """What `prove` found; true in a condition if it is the tuned model, rounded or not.

    Attributes:
        verdict: "the tuned model", "the base", "another template", "quantized" or "cannot tell".
        completions, chat: what was measured at /v1/completions and /v1/chat/completions; None where that was not
            served, or has no log-probabilities.
        notes: what a user should know.
    """

    url: str
    """The server that was asked."""
    model: str
    verdict: str
    completions: Measured | None = None
    chat: Measured | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return STATUS[self.verdict]

    def __bool__(self) -> bool:
        return self.verdict in (TUNED, QUANTIZED)

    def __str__(self) -> str:
        lines = [f"{self.model} at {self.url}: {self.verdict}"]
        for name, measured in (("completions", self.completions), ("chat", self.chat)):
            if measured is not None:
                lines.append(f"  {name}: {measured}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def prove(
    url: str,
    folder: str | os.PathLike[str],
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout: float = 120.0,
) -> ProofReport:
    """Ask an OpenAI-compatible server what the proof of a folder asks, and tell what answered.

    Args:
        url: of the server, with or without /v1.
        folder: the run, adapter or merged folder whose proof.json is replayed.
        model: the name that the server knows it by; None where it serves a single one.
        api_key: sent as a bearer token; None takes the environment's OPENAI_API_KEY.
        timeout: seconds for one answer.

    Returns:
        The verdict, and what was measured.

    Raises:
        ShippingError: no proof there, no server there, or no such model on it.

    Example:
        >>> ak.prove("http://localhost:8000", "runs/x/adapter", model="x").verdict
        'the tuned model'
    """
    proof = read_proof(_home(folder))
    server = Server(url, api_key, timeout)
    report = ProofReport(server.url, server.pick(model), UNKNOWN)
    completions = [(prompt, server.complete(report.model, prompt)) for prompt in proof.prompts]
    talked = [p for p in proof.prompts if p.messages is not None]
    chat = [(prompt, server.chat(report.model, prompt)) for prompt in talked]
    if not any(reply for _, reply in completions + chat):
        raise ShippingError(f"{server.url} serves neither /v1/completions nor /v1/chat/completions. {server.refused}")
    at_text, at_chat = _judge(proof, completions), _judge(proof, chat)
    report.completions, report.chat = at_text.measured, at_chat.measured
    first = at_text if at_text.asked else at_chat
    report.verdict, report.notes = first.verdict, list(first.notes)
    if at_chat.asked and at_chat.verdict != first.verdict:
        if report and at_chat.verdict != QUANTIZED:
            report.verdict = TEMPLATE
            report.notes.append("Asked with the rendered text it answers as trained; asked by chat it does not.")
        elif not at_text.asked or at_text.verdict == UNKNOWN:
            report.verdict = at_chat.verdict
    lengths = {reply.prompt_tokens for _, reply in chat if reply} - {None}
    expected = {len(prompt.ids) for prompt, reply in chat if reply}
    differ = bool(lengths) and any(r and r.prompt_tokens not in (None, len(p.ids)) for p, r in chat)
    if differ and report.verdict == UNKNOWN and not at_text.asked:
        report.verdict, report.notes = TEMPLATE, []
    if differ and report.verdict == TEMPLATE:
        report.notes.append(
            f"By chat the prompts have {_span(lengths)} tokens there, and {_span(expected)} in training."
        )
    return report


def replay(folder: Path, model: nn.Module, tokenizer: Any) -> str | None:
    """Ask a model in memory what a folder's proof.json was asked.

    Returns:
        What to tell where it is not the tuned model; None where it is, or where no proof tells it from the base.
    """
    proof = read_proof(folder) if (folder / PROOF).is_file() else None
    if proof is None or not proof.prompts or not all(prompt.positions for prompt in proof.prompts):
        return None
    with torch.no_grad():
        said = ask_again(proof, runner(model), tokenizer)
    replies = [(prompt, Reply("", one, None)) for prompt, one in zip(proof.prompts, said, strict=True)]
    judged = _judge(proof, list(replies))
    alike = judged.measured is None or judged.measured.apart <= proof.tolerance
    if alike or judged.verdict in (TUNED, QUANTIZED):
        return None
    return (
        f"{folder} does not answer as the model that its {PROOF} was written of: {judged.verdict} ({judged.measured}). "
        "Its weights were changed since; merge again, or delete that file if they were meant to be."
    )


def _home(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    return path if (path / PROOF).is_file() else adapter_folder(path)


def _span(lengths: set[int | None] | set[int]) -> str:
    known = sorted(length for length in lengths if length is not None)
    return str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


@dataclass
class _Judged:
    verdict: str
    asked: bool
    measured: Measured | None = None
    notes: tuple[str, ...] = ()


def _judge(proof: Proof, replies: list[tuple[Prompt, Reply | None]]) -> _Judged:
    answered = [(prompt, reply) for prompt, reply in replies if reply is not None]
    if not answered:
        return _Judged(UNKNOWN, False)
    measured = measure(answered)
    if measured is None:
        return _by_text(answered)
    limit, one = proof.tolerance, measured
    if one.apart <= limit:
        note = "Base and tuned model answer these prompts nearly alike; train for longer, or ask by hand."
        return _Judged(UNKNOWN, True, one, (note,))
    place = one.place(limit)
    if place is None:
        return _Judged(UNKNOWN, True, one, (_LIKE_ANOTHER,))
    if place == 0:
        return _Judged(BASE, True, one, _hint_of_base())
    if place == 1 and one.tuned <= limit:
        return _Judged(TUNED, True, one)
    if place == 1:
        return _Judged(QUANTIZED, True, one, (f"The tuned model with rounded weights: KL {one.tuned:.1e}.",))
    note = f"At {place:.2f} of the way from base to tuned model: look at the scale (alpha / r, rsLoRA) there."
    return _Judged(UNKNOWN, True, one, (note,))


_LIKE_ANOTHER = (
    "Neither base nor tuned model explains it better than another model would. Look at the scale (alpha / r, rsLoRA) "
    "there, at which adapter and base were loaded, and how coarsely they were rounded."
)


def _hint_of_base() -> tuple[str, ...]:
    return ("The adapter is not there, or changes nothing: adapters-kit check tells what that server ignores.",)


def _by_text(answered: list[tuple[Prompt, Reply]]) -> _Judged:
    """Where a server gives no log-probabilities: the greedy words alone."""
    tuned = base = known = 0
    for prompt, reply in answered:
        ours = _words(position.token for position in prompt.positions)
        theirs, got = _words(prompt.base_tokens), _words([reply.text])
        if ours == theirs or not got:
            continue
        known += 1
        tuned += got.startswith(ours) or (len(got) > 1 and ours.startswith(got))
        base += got.startswith(theirs) or (len(got) > 1 and theirs.startswith(got))
    note = f"No log-probabilities there: judged by the words of {known} answers."
    for count, verdict in ((tuned, TUNED), (base, BASE)):
        if known >= 2 and count == known:
            return _Judged(verdict, True, None, (note,))
    return _Judged(UNKNOWN, True, None, (note,))


def _words(parts: Iterable[str]) -> str:
    return " ".join("".join(parts).split())
