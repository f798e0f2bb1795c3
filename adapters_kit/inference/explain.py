"""Which parts of its input an answer comes from: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365), by
captum.

Tokens are moved in their embeddings from a padding token to themselves, pictures from even grey; a token's score is its
share of what the answer's log-probability gains on the way. The scores sum to the whole gain, and what the sum misses
is told beside them. Any adapter and any base through which a gradient flows will do: nothing of the model is changed.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from adapters_kit.anatomy.structure import base_model, unwrap
from adapters_kit.artifacts.files import write_text
from adapters_kit.errors import DataError, MissingPackageError, ModelError
from adapters_kit.inference.subject import Subject
from adapters_kit.pages.explanation_page import explanation_page
from adapters_kit.tasks.aims import Aim, aims, check_aims
from adapters_kit.tasks.base import autocast

STEPS = (32, 128, 512)  # more where the sum misses too much
MISSED = 0.02  # of the gain, or nats, that the sum of the scores may miss
ROWS = 16  # steps in a forward pass
GRID = 7  # regions of a picture, each way


@dataclass(frozen=True)
class Explanation:
    """Where one answer comes from.

    Attributes:
        of: the class, the words of the answer, the word and its tag; "value" of a regression.
        unit: of `value` and of the scores: "log-probability" (nats), or "output" of a regression.
        value: what the model gives for the row.
        nothing: what it gives where every explained token is padding, or the picture even grey.
        error: what the sum of the scores misses of `value` - `nothing`.
        tokens: text and score of each token that was read, special ones with a score of 0; empty for a picture.
        regions: (rows, columns) scores of a picture's regions; None for a text.
        picture: the picture as the model saw it, as a `data:` address; "" for a text.
    """

    of: str
    unit: str
    value: float
    nothing: float
    error: float
    tokens: tuple[tuple[str, float], ...] = ()
    regions: tuple[tuple[float, ...], ...] | None = None
    picture: str = ""

    def as_json(self) -> dict[str, Any]:
        """As it stands in an answer."""
        made: dict[str, Any] = {
            "of": self.of,
            "unit": self.unit,
            "value": round(self.value, 6),
            "nothing": round(self.nothing, 6),
            "error": round(self.error, 6),
        }
        if self.regions is not None:
            return {**made, "regions": [[round(score, 6) for score in row] for row in self.regions]}
        return {**made, "tokens": [{"token": text, "score": round(score, 6)} for text, score in self.tokens]}


def check_explain(task: str, n_best: int, page: bool | str | os.PathLike[str] = True) -> None:
    """What can be told before a model is loaded.

    Raises:
        DataError: a task whose answers are not explained; several answers a row; a page that is there or no .html.
        MissingPackageError: no captum.
    """
    check_aims(task)
    if n_best > 1:
        raise DataError(f"explain explains the best answer, not n_best={n_best}: leave one of them out.")
    if not isinstance(page, bool):
        if Path(page).suffix.lower() not in (".html", ".htm"):
            raise DataError(f"explain={os.fspath(page)!r}: the page is an .html file.")
        if not Path(page).absolute().parent.is_dir():
            raise DataError(f"explain={os.fspath(page)!r}: there is no folder {Path(page).absolute().parent}.")
    if find_spec("captum") is None:
        raise MissingPackageError("explain needs captum: pip install 'adapters-kit[explain]'")


def explain(subject: Subject, rows: Dataset) -> list[list[Explanation]]:
    """The explanations of every row's answer: one, or one a label, one a tagged word; none of an empty answer."""
    found: list[list[Explanation]] = [[] for _ in range(len(rows))]
    poor: list[int] = []
    for aim in aims(subject.task, subject.model, rows):
        with autocast(subject.model, next(subject.model.parameters()).device):
            made = _explain(subject, aim)
        found[aim.row].append(made)
        if abs(made.error) > 5 * _allowed(made.value - made.nothing):
            poor.append(aim.row)
    if poor:
        warnings.warn(
            f"{len(poor):,} explanations miss more than a tenth of what they share out (first: row {poor[0] + 1}), "
            f"after {STEPS[-1]} steps: 'error' tells how much.",
            UserWarning,
            stacklevel=3,
        )
    return found


def _allowed(gain: float) -> float:
    return MISSED * max(abs(gain), 1.0)


def _explain(subject: Subject, aim: Aim) -> Explanation:
    if "pixel_values" in aim.batch:
        return _of_a_picture(subject.model, aim)
    calls = _Calls(subject, aim)
    shares, value, nothing, error = _integrate(calls.forward, calls.given, calls.from_)
    scores = np.zeros(calls.ids.shape[1])
    for share, places in zip(shares, calls.places, strict=True):
        np.add.at(scores, np.maximum(places, 0), np.where(places >= 0, share[0].sum(-1).double().cpu().numpy(), 0.0))
    read = aim.read if aim.read is not None else len(scores)
    texts = [_text(subject.task.processor, token) for token in calls.ids[0, :read].tolist()]
    tokens = tuple(zip(texts, scores[:read].tolist(), strict=True))
    return Explanation(aim.of, aim.unit, value, nothing, error, tokens)


def _text(tokenizer: Any, token: int) -> str:
    """A token as text, with the blank before it that some tokenizers leave out of a single token."""
    text = str(tokenizer.decode([token]))
    begins = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
    return f" {text}" if begins and not text.startswith(" ") else text


def _of_a_picture(model: nn.Module, aim: Aim) -> Explanation:
    pixels = aim.batch["pixel_values"].float()

    def forward(given: torch.Tensor) -> torch.Tensor:
        return aim.value(model(pixel_values=given))

    (share,), value, nothing, error = _integrate(forward, (pixels,), (torch.zeros_like(pixels),))
    sums = share.sum(1, keepdim=True)  # (1, 1, height, width)
    height, width = (min(GRID, size) for size in sums.shape[-2:])
    inside = _sums(sums[0, 0], height, width)
    regions = tuple(tuple(row) for row in inside.tolist())
    return Explanation(aim.of, aim.unit, value, nothing, error, regions=regions, picture=_as_png(pixels[0]))


def _sums(scores: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sums over a grid of cells that do not overlap, (height, width); together the sum of all."""
    rows = np.array_split(np.arange(scores.shape[0]), height)
    columns = np.array_split(np.arange(scores.shape[1]), width)
    cells = [[scores[r[0] : r[-1] + 1, c[0] : c[-1] + 1].double().sum() for c in columns] for r in rows]
    return torch.tensor(cells)


def _as_png(pixels: torch.Tensor) -> str:
    from PIL import Image

    low, high = pixels.amin(), pixels.amax()
    grey = ((pixels - low) / (high - low).clamp(min=1e-9) * 255).round().byte().cpu().numpy()
    image = Image.fromarray(grey.transpose(1, 2, 0) if len(grey) == 3 else grey[0])
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


Tensors = tuple[torch.Tensor, ...]


def _integrate(forward: Any, given: Tensors, from_: Tensors) -> tuple[Tensors, float, float, float]:
    """Integrated gradients of one row: shares shaped as `given`, the value there and at `from_`, and what is missed."""
    from captum.attr import IntegratedGradients

    with torch.no_grad():
        value, nothing = float(forward(*given)[0]), float(forward(*from_)[0])
    for steps in STEPS:
        shares = IntegratedGradients(forward).attribute(given, from_, n_steps=steps, internal_batch_size=ROWS)
        error = float(sum(share.double().sum() for share in shares)) - (value - nothing)
        if abs(error) <= _allowed(value - nothing):
            break
    return shares, value, nothing, error


class _Calls:
    """The calls of the embedding in one forward pass, those that read the row's tokens: an encoder-decoder has two.

    Attributes:
        ids: (1, tokens) of the row, an answer behind them.
        given: what the embedding gave in each call, (1, tokens, width) float32.
        from_: the same where every explained token is padding.
        places: the token of each place of a call, -1 where it is none of the row's.
    """

    def __init__(self, subject: Subject, aim: Aim) -> None:
        self.aim, self.model = aim, subject.model
        self.ids = aim.batch["input_ids"]
        self.tables = _tables(subject.model)
        if not self.tables:
            raise ModelError(f"{subject.name} has no table of token embeddings, which explain moves its tokens in.")
        seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        with torch.no_grad(), self._hooked(lambda one, args, out: seen.append((one, args[0].detach(), out.detach()))):
            self.model(**aim.batch)
        placed = [self._places(ids) for _, ids, _ in seen]
        self.order = [number for number, places in enumerate(placed) if places is not None]
        if not self.order:
            raise ModelError(f"{subject.name} does not read tokens through its table of embeddings: not explained.")
        self.places: list[np.ndarray] = [places for places in placed if places is not None]
        self.given = tuple(seen[number][2].float() for number in self.order)
        with torch.no_grad():
            self.from_ = tuple(
                seen[number][0](self._nothing(seen[number][1], subject.task.processor, places)).float()
                for number, places in zip(self.order, self.places, strict=True)
            )

    def _places(self, ids: torch.Tensor) -> np.ndarray | None:
        """Which of the row's tokens stand in a call: they themselves, or moved by one as a decoder has them."""
        length, places = self.ids.shape[1], np.arange(self.ids.shape[1])
        if ids.shape != self.ids.shape:
            return None
        if torch.equal(ids, self.ids):
            return places
        moved = length > 1 and torch.equal(ids[:, 1:], self.ids[:, :-1]) and "labels" not in self.aim.batch
        return places - 1 if moved else None

    def _nothing(self, ids: torch.Tensor, tokenizer: Any, places: np.ndarray) -> torch.Tensor:
        """The ids with padding for every token that is explained and is not special."""
        pad = next(
            (t for t in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) if t is not None), 0
        )
        read = self.aim.read if self.aim.read is not None else self.ids.shape[1]
        kept = np.isin(ids[0].cpu().numpy(), tokenizer.all_special_ids) | (places < 0) | (places >= read)
        return torch.where(torch.as_tensor(kept, device=ids.device), ids, torch.full_like(ids, pad))

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """The aim's value where the calls give this instead, for any number of rows."""
        rows, count = len(given[0]), iter(range(10**6))
        replaced = dict(zip(self.order, given, strict=True))

        def instead(_: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            number = next(count)
            return replaced[number].to(out.dtype) if number in replaced else out

        batch = {key: tensor.expand(rows, *tensor.shape[1:]).contiguous() for key, tensor in self.aim.batch.items()}
        with self._hooked(instead):
            return self.aim.value(self.model(**batch))

    @contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        handles = [table.register_forward_hook(hook) for table in self.tables]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _tables(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the token embeddings, with what peft put around them; an encoder-decoder may have two."""
    try:
        table = base_model(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    weight = getattr(unwrap(table), "weight", None)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        mine = module is table or (isinstance(unwrap(module), nn.Embedding) and unwrap(module).weight is weight)
        if mine and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return list(found.values())


def explained(
    subject: Subject, rows: Dataset, answers: list[dict[str, Any]], page: bool | str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """The answers with `explained` in each; `page` is the file of the page, if it is a name."""
    found = explain(subject, rows)
    if not isinstance(page, bool):
        shown = [{key: value for key, value in row.items() if isinstance(value, str | float | int)} for row in answers]
        write_text(
            Path(page), explanation_page(f"Where the answers of {Path(subject.name).name} come from", shown, found)
        )
    return [
        {**answer, "explained": [one.as_json() for one in made]} for answer, made in zip(answers, found, strict=True)
    ]
