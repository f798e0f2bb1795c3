"""The training loop of one of many: Trainer's own, with the body of the model run for all of them at once.

The first step of a kind (with padding that others cause, and without) is made twice, in the pass and alone, and the
gradients are compared. Where they are not the same up to rounding, or the body cannot be shared, the training goes on
alone beside the others, which is said: its trajectory is that of its own run in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from adapters_kit.devices import random_state, set_random_state
from adapters_kit.training.loop import AdapterTrainer
from adapters_kit.training.many.conductor import BACKWARD, STEP, Joined
from adapters_kit.training.many.layout import UnjoinableError
from adapters_kit.training.many.seat import Seat

# The largest difference of a gradient, relative to its norm, that rounding explains; a row given to the wrong adapter,
# or a token that sees padding, is far above.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class JointTrainer(AdapterTrainer):
    """An `AdapterTrainer` that waits for the others at every step.

    Attributes:
        seat: where it waits; set before it trains.
        joined: its way to the shared bodies.
    """

    seat: Seat
    joined: Joined

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, in the pass of all where that gives its own gradients."""
        self.seat.wait(STEP)
        if self.seat.alone is not None:
            return super().training_step(model, inputs, num_items_in_batch)
        start, tokens = random_state(), self.meter.tokens
        before = None if self.seat.proven == {False, True} else self._gradients()
        try:
            with self.joined.on():
                loss = super().training_step(model, dict(inputs), num_items_in_batch)
                self.seat.wait(BACKWARD)
        except UnjoinableError as error:
            self._go_alone(f"this model's body cannot be shared: {error}")
            set_random_state(start)
            self.meter.tokens = tokens
            self._put_back(before or {})
            return super().training_step(model, inputs, num_items_in_batch)
        if before is not None and self.joined.padded not in self.seat.proven:
            self._prove(model, inputs, num_items_in_batch, start, before)
        return loss

    def _prove(self, model: nn.Module, inputs: dict[str, Any], items: Any, start: Any, before: Any) -> None:
        """Makes the step again, alone; its gradients are kept."""
        joint, after, tokens = self._gradients(), random_state(), self.meter.tokens
        self._put_back(before)
        set_random_state(start)
        Trainer.training_step(self, model, dict(inputs), items)
        self.meter.tokens = tokens
        difference = square = 0.0
        for parameter in self._trained():
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            other = joint.get(parameter)
            difference += float(((own if other is None else own - other).double() ** 2).sum())
            square += float((own.double() ** 2).sum())
        share = (difference / square) ** 0.5 if square else float(difference > 0)
        if not torch.equal(after[0], random_state()[0]):
            self._go_alone("this model draws random numbers (layer drop, noise) that cannot be told apart by row")
        elif not share <= _ROUNDING.get(self.accelerator.unwrap_model(model).dtype, 0.1):
            self._go_alone(f"in a pass with others its gradient differs by {share:.1g} of its norm from its own")
        else:
            self.seat.proven.add(self.joined.padded)

    def _go_alone(self, reason: str) -> None:
        self.seat.alone = reason
        self.screen.console.print(f"goes on alone, beside the others: {reason}.", highlight=False, soft_wrap=True)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        return {one: one.grad.clone() for one in self._trained() if one.grad is not None}

    def _put_back(self, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter in self._trained():
            parameter.grad = gradients.get(parameter)
