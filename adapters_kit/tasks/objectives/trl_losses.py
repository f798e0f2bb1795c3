"""TRL's losses, and nothing else of TRL: its trainers are asked for the loss of log-probabilities computed here.

So every architecture, method and quantization that the rest of the package knows can learn by them; TRL's own forward
pass reads the head's weight, which an adapter on the head, a quantized head or soft prompts would escape.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from adapters_kit.errors import RecipeError
from adapters_kit.recipe_sections import ObjectiveSpec


@dataclass(frozen=True)
class Loss:
    """A loss of TRL's.

    Attributes:
        beta: how many rewards a nat is worth.
        of: from log-probabilities `(answers, tokens)`, which of the tokens count, and the reference's sums
            `(answers,)`; of pairs all chosen answers come first.
    """

    beta: float
    of: Callable[[Tensor, Tensor, Tensor], Tensor]


def _counters() -> dict[str, Any]:
    return {"train": defaultdict(list), "eval": defaultdict(list)}


def _without_model(trainer: Any, fields: Mapping[str, Any]) -> Any:
    """One of TRL's trainers with what its loss reads, and no model, no data and no optimizer."""
    made = trainer.__new__(trainer)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=gather, gather_for_metrics=gather)
    made.__dict__.update(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )
    return made


def _outputs(log_probs: Tensor) -> Callable[..., SimpleNamespace]:
    """What TRL takes for a model: it is asked for log-probabilities, and for what its logs show, which nobody reads."""
    nothing = torch.zeros_like(log_probs)
    fields = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
    return lambda **inputs: SimpleNamespace(log_probs=log_probs, **fields)


def _padded(mask: Tensor) -> dict[str, Tensor]:
    """The inputs that TRL counts tokens in: a first token before those that are predicted."""
    whole = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1).long()
    return {"input_ids": whole, "attention_mask": whole, "completion_mask": whole * 1}


def defaults(config: Any) -> dict[str, Any]:
    """The fields of one of TRL's configs, by name."""
    return {name: field.default for name, field in config.__dataclass_fields__.items()}


def dpo(spec: ObjectiveSpec) -> Loss:
    """The loss of pairs.

    Raises:
        RecipeError: a loss that TRL does not have, in its words.
    """
    from trl import DPOConfig, DPOTrainer

    default = defaults(DPOConfig)
    beta = spec.beta if spec.beta is not None else default["beta"]
    engine = _without_model(
        DPOTrainer,
        {
            "beta": beta,
            "loss_types": [spec.loss_type or "sigmoid"],
            "loss_weights": [1.0],
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "label_smoothing": spec.label_smoothing,
            "use_weighting": False,
            "args": SimpleNamespace(discopop_tau=default["discopop_tau"]),
        },
    )

    def loss(log_probs: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
        engine._metrics, engine.accelerator.device = _counters(), log_probs.device
        chosen, rejected = reference.to(log_probs.dtype).chunk(2)
        inputs = {**_padded(mask), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return engine._compute_loss(_outputs(log_probs), inputs, False)

    _try(loss, spec)
    return Loss(beta, loss)


def orpo(spec: ObjectiveSpec) -> Loss:
    """The odds ratio of pairs, of mean log-probabilities; what TRL adds to the chosen text's cross-entropy."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    beta = spec.beta if spec.beta is not None else defaults(ORPOConfig)["beta"]
    engine = _without_model(ORPOTrainer, {"beta": beta})

    def loss(means: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
        chosen, rejected = means[:, 0].chunk(2)
        return -engine.odds_ratio_loss(chosen, rejected)[0].mean()

    return Loss(beta, loss)


def kto(spec: ObjectiveSpec) -> Loss:
    """The loss of judged answers: from the sums of all answers and then of others to their prompts `(2 answers,)`,
    which of them are good `(answers,)`, and the reference's sums `(2 answers,)`.
    """
    from trl import KTOConfig, KTOTrainer

    default = defaults(KTOConfig)
    beta = spec.beta if spec.beta is not None else default["beta"]
    fields = {"calculate_KL": True, "loss_type": "kto", "beta": beta}
    weights = {name: getattr(spec, name) for name in ("desirable_weight", "undesirable_weight")}
    engine = _without_model(KTOTrainer, {**fields, **weights})

    def loss(sums: Tensor, good: Tensor, reference: Tensor) -> Tensor:
        engine._metrics, engine.accelerator.device = _counters(), sums.device
        (answers, others), (before, others_before) = sums.chunk(2), reference.to(sums.dtype).chunk(2)
        engine._compute_kl_logps = lambda model, batch: others.detach()
        inputs = {**_padded(torch.ones_like(answers)[:, None]), "label": good}
        inputs |= {"ref_logps": before, "ref_KL_logps": others_before}
        return engine._compute_loss(_outputs(answers[:, None]), inputs, False)

    return Loss(beta, loss)


def reward(spec: ObjectiveSpec) -> Loss:
    """The loss of scores `(2 pairs,)`, those of all chosen answers first."""
    from trl import RewardTrainer

    engine = _without_model(RewardTrainer, {"args": SimpleNamespace(center_rewards_coefficient=spec.center)})

    def loss(scores: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
        engine._metrics, engine.accelerator.device = _counters(), scores.device
        inputs = {"attention_mask": torch.ones_like(scores)[:, None]}
        return engine.compute_loss(lambda **given: SimpleNamespace(logits=scores[:, None]), inputs)

    return Loss(1.0, loss)


def _try(loss: Callable[[Tensor, Tensor, Tensor], Tensor], spec: ObjectiveSpec) -> None:
    """Refuses what TRL would refuse, before anything is loaded."""
    try:
        found = loss(torch.tensor([[-1.0], [-2.0]]), torch.ones(2, 1), torch.tensor([-1.5, -1.5]))
    except (ValueError, KeyError) as error:
        raise RecipeError([f"objective.loss_type: {error}"]) from error
    if not torch.isfinite(found):
        what = f"objective.loss_type: {spec.loss_type} with label_smoothing {spec.label_smoothing:g} is not finite"
        raise RecipeError([f"{what}: give a label_smoothing above 0."])


def quiet_trl() -> None:
    """Without TRL's telemetry and its notice that some of it is experimental."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
