"""What a server's log-probabilities say for each explanation: the base answers, the tuned model does, or what else?

1. The first position of an answer has the same text before it whatever the model; later ones as long as the server's
   tokens are the tuned model's. Only such positions are compared.
2. From base to tuned model leads a line, in log-probabilities of the tokens that all three name, less their mean at
   each position: 0 is the base, 1 the tuned model, 2 about an adapter counted twice. An explanation is a place on it.
   What it leaves unexplained, D, is half the mean square of the server's distance from it over m values: nats, as the
   Kullback-Leibler divergence of two near distributions is half the square of what their log-probabilities differ by.
3. Errors of rounding are about normal, and their size is not known beforehand (weights in 4 bit err more than in 16).
   Then the likelihood of an explanation is D^(-m/2). Nothing is known to be closer than two implementations of the
   same weights are, the proof's tolerance: that is the least D.
4. A place in between has a parameter more, the place itself, so that its likelihood is divided by √m (Schwarz 1978). It
   is asked only where it is a strength that a wrong scale could give.
5. An explanation that leaves a fourth of what lies between base and tuned model explains nothing: some other model does
   as well. None is given that is not `ODDS` times as likely as that, and as each other one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from adapters_kit.artifacts.proof import Position, Prompt
from adapters_kit.serving.client import Reply

ODDS = 20.0
_SCALED = 0.15  # a scale that is wrong is wrong by more; alpha / √r for alpha / r is by 41 % from r = 2 on
_LEAST = 1e-6  # probability of what is not named


@dataclass(frozen=True)
class Measured:
    """What one of a server's addresses says, beside base and tuned model; means over positions.

    Attributes:
        tuned, base: Kullback-Leibler divergence of the server from each, in nats.
        apart: of the base from the tuned model, at the same positions.
        strength: where the server stands between base (0) and tuned model (1); NaN where they are the same.
        positions, values: how many were compared; of log-probabilities those that could differ.
        left: what the base, the tuned model and the place at `strength` leave unexplained, in nats.
        line: the same for base and tuned model, of each other.
    """

    tuned: float
    base: float
    apart: float
    strength: float
    positions: int
    values: int
    left: tuple[float, float, float]
    line: float

    def __str__(self) -> str:
        strength = "" if math.isnan(self.strength) else f", strength {self.strength:.2f}"
        return (
            f"KL {self.tuned:.1e} from the tuned model and {self.base:.1e} from the base, which are {self.apart:.1e} "
            f"apart{strength}; {self.positions} positions"
        )

    def place(self, least: float) -> float | None:
        """Where on the line the server stands: 0 the base, 1 the tuned model, else its strength; None where no place
        is likely enough.

        Args:
            least: nats between two implementations of the same weights.
        """

        base, tuned, rest = self.left

        def likelihood(left: float) -> float:
            return -self.values / 2 * math.log(max(left, least))

        found = {0.0: likelihood(base), 1.0: likelihood(tuned)}
        if min(abs(self.strength), abs(self.strength - 1)) > _SCALED:  # false for NaN
            found[self.strength] = likelihood(rest) - math.log(self.values) / 2
        best, *others = sorted(found, key=lambda place: -found[place])
        rivals = [likelihood(self.line / 4), *(found[place] for place in others)]
        return best if found[best] - max(rivals) >= math.log(ODDS) else None


def measure(answered: list[tuple[Prompt, Reply]]) -> Measured | None:
    """Means over all positions that can be compared; None if there are none."""
    compared = []
    for prompt, reply in answered:
        bare = not any(token[:1].isspace() for _, top in reply.positions for token in top)
        for position, (token, top) in zip(prompt.positions, reply.positions, strict=False):
            if not top:
                break
            compared.append((position, _named(position, top) if bare else top))
            if token.strip() != position.token.strip():
                break
    if not compared:
        return None
    count = len(compared)
    tuned = sum(_divergence(position.tuned, top) for position, top in compared) / count
    base = sum(_divergence(position.base, top) for position, top in compared) / count
    apart = sum(_divergence(position.tuned, position.base) for position, _ in compared) / count
    squares = along = gone = 0.0
    values = 0
    for position, top in compared:
        both = sorted(position.tuned.keys() & top.keys())
        step = _centred([position.tuned[token] - position.base[token] for token in both])
        way = _centred([top[token] - position.base[token] for token in both])
        squares += sum(one * one for one in step)
        along += sum(one * other for one, other in zip(step, way, strict=True))
        gone += sum(one * one for one in way)
        values += max(len(both) - 1, 0)
    strength = along / squares if squares > 1e-6 else math.nan

    def left(place: float) -> float:
        return max(0.0, gone - 2 * place * along + place * place * squares) / (2 * max(values, 1))

    rest = left(0 if math.isnan(strength) else strength)
    line = squares / (2 * max(values, 1))
    return Measured(tuned, base, apart, strength, count, values, (left(0), left(1), rest), line)


def _centred(values: list[float]) -> list[float]:
    return [value - sum(values) / len(values) for value in values]


def _named(position: Position, top: Mapping[str, float]) -> dict[str, float]:
    """A server's tokens by our names, of a server that leaves out the space that a token begins with."""
    bare: dict[str, list[str]] = {}
    for name in position.tuned:
        bare.setdefault(name.strip(), []).append(name)
    found = {}
    for token, value in top.items():
        alike = bare.get(token.strip(), [])
        found[token if token in position.tuned or len(alike) != 1 else alike[0]] = value
    return found


def _divergence(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """KL of p, ours, from q, the server's, over the tokens that either names, and all others as one. A token that the
    server does not name is at most as likely there as the last that it names; one that we do not name (parts of
    characters are left out) has at most what our others leave. Of what that allows, the nearest to the other is taken.
    """
    free_p, least_q = math.log(max(1 - sum(map(math.exp, p.values())), _LEAST)), min(q.values())
    total, rest_p, rest_q = 0.0, 1.0, 1.0
    for token in p.keys() | q.keys():
        one = p[token] if token in p else min(free_p, q[token])
        other = q[token] if token in q else min(least_q, p[token])
        total += math.exp(one) * (one - other)
        rest_p, rest_q = rest_p - math.exp(one), rest_q - math.exp(other)
    rest_p, rest_q = max(rest_p, _LEAST), max(rest_q, _LEAST)
    return max(0.0, total + rest_p * math.log(rest_p / rest_q))
