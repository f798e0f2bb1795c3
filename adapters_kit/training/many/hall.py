"""Where trainings that go together meet: the base that is theirs in common, and the bodies that run for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from adapters_kit.kernels.recompute import recompute_cheap
from adapters_kit.quantization import keep_layout
from adapters_kit.recipe import Recipe
from adapters_kit.tasks.base import Task
from adapters_kit.training.assembly import set_dropout
from adapters_kit.training.many.base import SharedBase, same_tensors
from adapters_kit.training.many.body import Body, bodies
from adapters_kit.training.many.conductor import Conductor, Joined
from adapters_kit.training.many.seat import Seat
from adapters_kit.training.many.trainer import JointTrainer


class Hall:
    """What the trainings of one call have in common."""

    def __init__(self) -> None:
        self.base = SharedBase()
        self._bodies: dict[float | None, list[Body]] = {}

    def shared(self, recipe: Recipe, bare: nn.Module) -> list[Body]:
        """The bodies that run for all trainings with this one's base dropout.

        Args:
            bare: the base, without an adapter.
        """
        dropout = recipe.training.base_dropout
        if dropout not in self._bodies:
            set_dropout(bare, dropout)
            keep_layout(bare)
            if recipe.training.recompute:
                recompute_cheap(bare)
            bare.requires_grad_(False).train()
            self._bodies[dropout] = [Body(body) for body in bodies(bare).values()]
        return self._bodies[dropout]

    def leave(self, seat: Seat) -> None:
        """Lets go of a training that has ended."""
        for shared in self._bodies.values():
            for body in shared:
                body.remove(seat)


class Guest:
    """One training in the hall: where its model comes from, and its loop.

    Attributes:
        seat: its own.
    """

    def __init__(self, hall: Hall, seat: Seat | None = None) -> None:
        self.hall, self.seat = hall, seat
        self._bare: Any = None

    def load(self, recipe: Recipe, task: Task) -> tuple[nn.Module, Any]:
        """The base model, its tensors those of the first."""
        model, processor = self.hall.base.load(recipe, task)
        self._bare = same_tensors(model)
        return model, processor

    def trainer(self, model: nn.Module, task: Task, recipe: Recipe, *given: Any, **options: Any) -> JointTrainer:
        """The loop, on its way through the shared bodies; arguments are an `AdapterTrainer`'s."""
        assert self.seat is not None  # it has one before it trains
        loop = JointTrainer(model, task, recipe, *given, **options)
        own, shared = bodies(model), self.hall.shared(recipe, self._bare)
        for body, theirs in zip(shared, own.values(), strict=True):
            body.add(self.seat, theirs)
        loop.seat, loop.joined = self.seat, Joined(self.seat, list(own.values()), shared)
        return loop


def seated(hall: Hall, works: Sequence[tuple[str, Callable[[Guest], Any]]]) -> list[Seat]:
    """Makes all trainings, by name, step by step together; their seats hold what came of each."""

    def one(work: Callable[[Guest], Any], seat: Seat) -> Any:
        try:
            return work(Guest(hall, seat))
        finally:
            hall.leave(seat)

    seats = [Seat(name, partial(one, work)) for name, work in works]
    Conductor(seats).run()
    return seats
