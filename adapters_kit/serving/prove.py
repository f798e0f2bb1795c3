"""prove(): what answers behind an address, the tuned model or something else?

Servers answer from the base, or through another template, without a word. `proof.json` holds what base and tuned model
say to a few prompts; the server is asked the same, and its log-probabilities are compared with both.

1. The first position of an answer has the same text before it whatever the model; later ones as long as the server's
   tokens are the tuned model's. Only such positions are compared.
2. A server names its likeliest tokens. Over those and ours, and all others as one, the Kullback-Leibler divergence
   from the tuned model and from the base is measured: about a lower bound of the whole one.
3. On the line from base to tuned model, in log-probabilities, the server stands somewhere: 0 is the base, 1 the tuned
   model, 2 an adapter counted twice. Rounding the weights leaves it near 1; a wrong scale does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters_kit.artifacts.adapter import adapter_folder
from adapters_kit.artifacts.proof import PROOF, TOP, Position, Prompt, Proof, read_proof
from adapters_kit.errors import ShippingError
from adapters_kit.serving.client import Reply, Server

TUNED, BASE, TEMPLATE, QUANTIZED, UNKNOWN = (
    "the tuned model", "the base", "another template", "quantized", "cannot tell",
)  # fmt: skip
STATUS = {TUNED: 0, BASE: 3, TEMPLATE: 4, QUANTIZED: 5, UNKNOWN: 6}
_NEAR = (0.85, 1.15)  # where rounded weights may stand on the line from base (0) to tuned model (1)


@dataclass(frozen=True)
class Measured:
    """What one of a server's addresses says, beside base and tuned model; means over positions.

    Attributes:
        tuned, base: Kullback-Leibler divergence of the server from each, in nats.
        apart: of the base from the tuned model, at the same positions.
        strength: where the server stands between base (0) and tuned model (1); NaN where they are the same.
        positions: how many were compared.
    """

    tuned: float
    base: float
    apart: float
    strength: float
    positions: int

    def __str__(self) -> str:
        strength = "" if math.isnan(self.strength) else f", strength {self.strength:.2f}"
        return (
            f"KL {self.tuned:.1e} from the tuned model and {self.base:.1e} from the base, which are {self.apart:.1e} "
            f"apart{strength}; {self.positions} positions"
        )


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
    measured = _measure(answered)
    if measured is None:
        return _by_text(answered)
    limit, one = proof.tolerance, measured
    if one.apart < 4 * limit:
        note = "Base and tuned model answer these prompts nearly alike; train for longer, or ask by hand."
        return _Judged(UNKNOWN, True, one, (note,))
    if one.tuned <= limit:
        return _Judged(TUNED, True, one)
    if one.base <= limit or (abs(one.strength) < 0.2 and one.base < one.tuned / 2):
        return _Judged(BASE, True, one, _hint_of_base())
    if _NEAR[0] <= one.strength <= _NEAR[1] and one.tuned < one.base / 2:
        return _Judged(QUANTIZED, True, one, (f"The tuned model with rounded weights: KL {one.tuned:.1e}.",))
    note = f"At {one.strength:.2f} of the way from base to tuned model: look at the scale (alpha / r, rsLoRA) there."
    between = one.tuned < one.apart and not math.isnan(one.strength)
    return _Judged(UNKNOWN, True, one, (note,) if between else ("Neither base nor tuned model.",))


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


def _measure(answered: list[tuple[Prompt, Reply]]) -> Measured | None:
    """Means over all positions that can be compared; None if there are none."""
    sums = [0.0, 0.0, 0.0]
    along = length = 0.0
    count = 0
    for prompt, reply in answered:
        for position, (token, top) in zip(prompt.positions, reply.positions, strict=False):
            if not top:
                break
            count += 1
            top = _named(position, top)
            pairs = ((position.tuned, top), (position.base, top), (position.tuned, position.base))
            for index, (p, q) in enumerate(pairs):
                sums[index] += _divergence(p, q)
            one, all_of = _along(position, top)
            along, length = along + one, length + all_of
            if token.strip() != position.token.strip():
                break
    if not count:
        return None
    tuned, base, apart = (total / count for total in sums)
    return Measured(tuned, base, apart, along / length if length > 1e-6 else math.nan, count)


def _named(position: Position, top: Mapping[str, float]) -> dict[str, float]:
    """A server's tokens by our names: some servers leave out the space that a token begins with."""
    bare: dict[str, list[str]] = {}
    for name in position.tuned:
        bare.setdefault(name.strip(), []).append(name)
    found = {}
    for token, value in top.items():
        alike = bare.get(token.strip(), [])
        found[token if token in position.tuned or len(alike) != 1 else alike[0]] = value
    return found


def _divergence(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """KL of p from q over the tokens that either names, and all others as one. A token that one of them does not name
    is at most as likely there as the last that it names; of what that allows, the nearest to the other is taken."""
    least_p, least_q = sorted(p.values(), reverse=True)[:TOP][-1], min(q.values())
    total, rest_p, rest_q = 0.0, 1.0, 1.0
    for token in p.keys() | q.keys():
        one = p[token] if token in p else min(least_p, q[token])
        other = q[token] if token in q else min(least_q, p[token])
        total += math.exp(one) * (one - other)
        rest_p, rest_q = rest_p - math.exp(one), rest_q - math.exp(other)
    rest_p, rest_q = max(rest_p, 1e-6), max(rest_q, 1e-6)
    return max(0.0, total + rest_p * math.log(rest_p / rest_q))


def _along(position: Position, top: Mapping[str, float]) -> tuple[float, float]:
    """Numerator and denominator of the server's place on the line from base to tuned model, the position's share."""
    both = sorted(position.tuned.keys() & top.keys())
    if len(both) < 2:
        return 0.0, 0.0
    step = [position.tuned[token] - position.base[token] for token in both]
    gone = [top[token] - position.base[token] for token in both]
    middle, centre = sum(step) / len(step), sum(gone) / len(gone)
    along = sum((s - middle) * (g - centre) for s, g in zip(step, gone, strict=True))
    return along, sum((s - middle) ** 2 for s in step)
