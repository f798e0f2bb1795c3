"""Parametrized hypercomplex multiplication: the linear maps inside Compacter.

Zhang et al. 2021 (arXiv:2102.08597) write a matrix as a sum of n Kronecker products, H = Σᵢ Aᵢ ⊗ Bᵢ. Compacter
(Mahabadi et al. 2021, arXiv:2106.04647) shares the small Aᵢ between all layers and makes each Bᵢ of low rank.
"""

import torch
from torch import nn


class PHMRule(nn.Module):
    """The n matrices Aᵢ, each (n, n). One instance serves every layer of an adapter when the rule is shared.

    Args:
        dim: n.
        factorized: keep each Aᵢ as an outer product of two vectors.
        learn: train it; otherwise it stays as drawn, and is saved all the same.
        init: "normal" (standard deviation `init_range`) or "uniform" (between -1 and 1).
    """

    def __init__(self, dim: int, *, factorized: bool, learn: bool, init: str, init_range: float) -> None:
        super().__init__()
        shapes = {"left": (dim, dim, 1), "right": (dim, 1, dim)} if factorized else {"full": (dim, dim, dim)}
        for name, shape in shapes.items():
            values = torch.empty(shape)
            if init == "normal":
                values.normal_(std=init_range)
            else:
                values.uniform_(-1, 1)
            if learn:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)
        self.factorized = factorized

    def forward(self) -> torch.Tensor:
        """The rule, (n, n, n)."""
        return self.left @ self.right if self.factorized else self.full


class PHMLinear(nn.Module):
    """`y = x (Σᵢ Aᵢ ⊗ Bᵢ) + b`, without ever building the Kronecker products.

    Args:
        in_features, out_features: multiples of the rule's n.
        rule: the Aᵢ.
        dim: n.
        rank: of each Bᵢ; None keeps them full.
        bias: add a bias.
    """

    def __init__(
        self, in_features: int, out_features: int, rule: PHMRule, *, dim: int, rank: int | None, bias: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dim, self.rank = in_features, out_features, dim, rank
        self.rule = rule
        if rank is None:
            self.weight = nn.Parameter(torch.empty(dim, in_features // dim, out_features // dim))
        else:
            self.weight_left = nn.Parameter(torch.empty(dim, in_features // dim, rank))
            self.weight_right = nn.Parameter(torch.empty(dim, rank, out_features // dim))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        for block in (*self.weight,) if rank is None else (*self.weight_left, *self.weight_right):
            nn.init.xavier_normal_(block)

    @torch.no_grad()
    def zero_(self) -> None:
        """Make the map zero, in a way that still lets a gradient in."""
        (self.weight if self.rank is None else self.weight_right).zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = x.unflatten(-1, (self.dim, -1))
        # i: which product, p/q: row/column of Aᵢ, a/b: row/column of Bᵢ, r: rank.
        if self.rank is None:
            y = torch.einsum("...pa,ipq,iab->...qb", x, self.rule(), self.weight)
        else:
            inner = torch.einsum("...pa,iar->...pir", x, self.weight_left)
            inner = torch.einsum("...pir,ipq->...qir", inner, self.rule())
            y = torch.einsum("...qir,irb->...qb", inner, self.weight_right)
        y = y.flatten(-2)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Its sizes, in the model's printed form."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dim={self.dim}, rank={self.rank}"
