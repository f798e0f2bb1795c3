"""Cross-entropy of a frozen output head, a few tokens at a time: the logits of a whole batch never exist.

For each chunk of tokens the logits, the loss and the gradient on the hidden states are computed in the forward pass,
and the logits dropped. What stays for the backward pass is one tensor like the hidden states, in place of several of
`(tokens, vocabulary)`. The head gets no gradient, so it has to be frozen.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.loss.loss_utils import LOSS_MAPPING

from adapters_kit.anatomy import base_model
from adapters_kit.kernels.base_layers import is_plain
from adapters_kit.kernels.stand_in import StandIn

# Logits held at a time, in elements: a few megabytes keep a CPU's caches warm, a GPU wants larger products.
_CPU_LOGITS, _GPU_LOGITS = 2**22, 2**26
LAZY = "_lazy_logits"  # on a model: its logits are asked for as `LazyLogits`, without labels too (token_scores.py)


def tokens_at_once(vocabulary: int, gpu: bool) -> int:
    """Tokens whose logits are held at a time."""
    return max(16, (_GPU_LOGITS if gpu else _CPU_LOGITS) // vocabulary)


def chunk_bytes(tokens: int, vocabulary: int, *, gpu: bool) -> int:
    """Bytes that the chunked loss of `tokens` tokens holds for a moment: its logits in float32, and once more."""
    return 8 * vocabulary * min(tokens, tokens_at_once(vocabulary, gpu))


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, str[] names, float[] values, int ignore_index, "
    "float label_smoothing, bool want_grad) -> (Tensor, Tensor)"
)


@torch.library.custom_op("adapters_kit::linear_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    names: list[str],
    values: list[float],
    ignore_index: int,
    label_smoothing: float,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss summed over the tokens, and its gradient on `hidden`. One opaque operation for torch.compile."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    vocabulary = weight.shape[0]
    chunk = tokens_at_once(vocabulary, hidden.device.type != "cpu")
    total = hidden.new_zeros((), dtype=exact)
    grad = torch.empty_like(hidden if want_grad else hidden[:0])
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk]
        target = labels[start : start + chunk]
        valid = (target != ignore_index).unsqueeze(1)
        target = target.unsqueeze(1).masked_fill(~valid, 0)
        z = F.linear(rows, weight, bias).to(exact)
        bent = []
        for name, value in zip(names, values, strict=True):
            if name == "mul":
                z.mul_(value)
            else:
                z.tanh_()
                bent.append(z.clone() if want_grad else z)
        largest = torch.logsumexp(z, dim=1, keepdim=True)
        loss = largest - (1 - label_smoothing) * z.gather(1, target)
        if label_smoothing:
            loss -= label_smoothing * z.mean(1, keepdim=True)
        total += loss.masked_fill_(~valid, 0).sum()
        if not want_grad:
            continue
        z.sub_(largest).exp_()
        z.scatter_add_(1, target, z.new_full(target.shape, label_smoothing - 1))
        if label_smoothing:
            z.sub_(label_smoothing / vocabulary)
        z.mul_(valid)
        for name, value in zip(reversed(names), reversed(values), strict=True):
            if name == "mul":
                z.mul_(value)
            else:
                t = bent.pop()
                z.mul_(t.square_().neg_().add_(1))
        torch.mm(z.to(weight.dtype), weight, out=grad[start : start + chunk])
    return total, grad


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    want_grad = others[-1]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=exact), torch.empty_like(hidden if want_grad else hidden[:0])


def _keep_grad(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _scale_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "The chunked loss cannot be differentiated twice (create_graph=True): it keeps a gradient, not the logits. "
            "Switch it off with adapters_kit.kernels.cross_entropy.plain_loss(model)."
        )
    (kept,) = ctx.saved_tensors
    return (None if grad is None else kept * grad.to(kept.dtype), *[None] * 8)


_linear_cross_entropy.register_autograd(_scale_grad, setup_context=_keep_grad)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    steps: tuple[tuple[str, float], ...] = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of `steps(hidden · weightᵀ + bias)`, summed over the tokens that are not ignored.

    Args:
        hidden: `(tokens, hidden size)`; the only argument that gets a gradient, and only a first one.
        weight: frozen `(vocabulary, hidden size)` in the dtype of `hidden`.
        labels: int64 `(tokens,)`.
        steps: what is done to the logits, elementwise: `("mul", factor)` or `("tanh", 0.0)`. A cap c on the logits is
            `("mul", 1 / c), ("tanh", 0), ("mul", c)`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Logits are rounded to the dtype of `hidden`, then float32.
    """
    # A fake tensor, on which memory.py counts bytes, has no values to look at.
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(labels, FakeTensor):
        kept = (labels != ignore_index).nonzero().squeeze(1)
        if len(kept) < len(labels):  # prompts and padding cost nothing
            hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    want_grad = torch.is_grad_enabled() and hidden.requires_grad
    names, values = [name for name, _ in steps], [value for _, value in steps]
    total, _ = _linear_cross_entropy(
        hidden.contiguous(), weight, bias, labels, names, values, ignore_index, label_smoothing, want_grad
    )
    return total


class LazyLogits(StandIn):
    """The logits of a head that was not run: its input, and what was done to its output since.

    Scaling, tanh and casts are noted down. Anything else makes the logits, as the head would have, and goes on.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, steps: tuple[tuple[str, Any], ...] = ()) -> None:
        self.hidden, self.head, self.steps = hidden, head, steps

    def _with(self, name: str, value: Any = 0.0) -> "LazyLogits":
        return LazyLogits(self.hidden, self.head, (*self.steps, (name, value)))

    def make(self) -> Tensor:
        """The logits as a tensor."""
        z = nn.Linear.forward(self.head, self.hidden)
        for name, value in self.steps:
            z = z.to(value) if name == "to" else torch.tanh(z) if name == "tanh" else z * value
        return z

    @property
    def shape(self) -> torch.Size:
        """`(..., vocabulary)`."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def device(self) -> torch.device:
        """Where the logits would be made."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the last cast, or that of the head's product."""
        casts = [value for name, value in self.steps if name == "to"]
        return casts[-1] if casts else _compute_dtype(self.hidden)

    def __mul__(self, other: Any) -> Any:
        return self._with("mul", float(other)) if isinstance(other, int | float) else self.make() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._with("mul", 1.0 / other) if isinstance(other, int | float) else self.make() / other

    def contiguous(self) -> "LazyLogits":
        """Itself: there is nothing to lay out yet."""
        return self

    def tanh(self) -> "LazyLogits":
        """Noted down, as half of a cap on the logits."""
        return self._with("tanh")

    def float(self) -> "LazyLogits":
        """A cast to float32, noted down."""
        return self._with("to", torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A cast is noted down; a move elsewhere makes the logits."""
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
            return self._with("to", args[0])
        if len(args) == 1 and not kwargs and args[0] == self.device:
            return self
        return self.make().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return super().__torch_function__(func, types, args, kwargs)

    def __len__(self) -> int:
        return self.shape[0]


class ChunkedHead(nn.Linear):
    """An output head that returns `LazyLogits` while a training loss is being computed."""

    def forward(self, x: Tensor) -> "Tensor | LazyLogits":  # type: ignore[override]
        """The logits `(..., vocabulary)`, or what they are to be made of."""
        if self.__dict__.get("_armed") and why_plain_head(self) is None and _fits(self, x):
            return LazyLogits(x, self)
        return super().forward(x)


class ChunkedLoss:
    """Takes the place of a causal LM's `loss_function`; ordinary logits go to the original."""

    def __init__(self, original: Any, label_smoothing: float) -> None:
        self.original, self.label_smoothing, self.training = original, label_smoothing, False

    def __call__(
        self,
        logits: "Tensor | LazyLogits",
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: "Tensor | int | None" = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the original's: the mean over the labels that count, or their sum over `num_items_in_batch`."""
        smoothing = self.label_smoothing if self.training else 0.0
        if isinstance(logits, LazyLogits) and vocab_size != logits.shape[-1]:
            logits = logits.make()
        if not isinstance(logits, LazyLogits) and not smoothing:
            return self.original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(logits.device)
        if isinstance(logits, LazyLogits):
            dtype = _compute_dtype(logits.hidden)
            head = logits.head
            total = linear_cross_entropy(
                logits.hidden.reshape(-1, logits.hidden.shape[-1]).to(dtype),
                head.weight.to(dtype),
                target,
                None if head.bias is None else head.bias.to(dtype),
                steps=tuple(step for step in logits.steps if step[0] != "to"),
                ignore_index=ignore_index,
                label_smoothing=smoothing,
            )
        else:
            total = F.cross_entropy(
                logits.float().reshape(-1, vocab_size),
                target,
                ignore_index=ignore_index,
                label_smoothing=smoothing,
                reduction="sum",
            )
        if num_items_in_batch is None:
            return total / (target != ignore_index).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


@dataclass(frozen=True)
class LossReport:
    """Whether the loss is computed in chunks, and if not, why."""

    chunked: bool
    """Whether it is."""
    reason: str | None = None
    """Why not; None if it is."""

    def __str__(self) -> str:
        return "the loss is computed in chunks" if self.chunked else f"the loss is the model's own: {self.reason}"


def chunked_loss(model: nn.Module, *, label_smoothing: float = 0.0) -> LossReport:
    """Compute the training loss of a causal language model without its logits, where the head is frozen.

    Changed are the class of the head, the model's `loss_function` and two hooks; weights, names and checkpoints stay.
    In training with `labels`, `output.logits` is a `LazyLogits`, which computes itself if it is used after all.
    Evaluation and generation are untouched. Calling it again is harmless.

    Args:
        model: a transformers causal LM, bare or wrapped by peft. Changed in place.
        label_smoothing: in training, as the Trainer's `label_smoothing_factor`, which would ask for the logits.

    Returns:
        Whether it applies; if not, the model is as it was and the reason is given. A head that is adapted, trained or
        hooked later makes the model compute its own loss again.
    """
    base: Any = base_model(model)
    if isinstance(getattr(base, "_loss_function", None), ChunkedLoss):
        base._loss_function.label_smoothing = label_smoothing
        return LossReport(True)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        return LossReport(False, f"{type(base).__name__} has no output head over a vocabulary")
    reason = why_plain_head(head)
    if reason is not None:
        return LossReport(False, reason)
    calls = inspect.unwrap(type(base).forward).__code__.co_names
    if "loss_function" not in calls or base.loss_function is not LOSS_MAPPING["ForCausalLM"]:
        return LossReport(False, f"{type(base).__name__} does not use transformers' loss for causal language models")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return LossReport(False, "prompt learning changes the labels")
    head.__class__ = ChunkedHead
    base._loss_function = ChunkedLoss(base.loss_function, label_smoothing)
    base.register_forward_pre_hook(_arm, with_kwargs=True)
    base.register_forward_hook(_disarm, always_call=True)
    return LossReport(True)


def is_chunked(model: nn.Module) -> bool:
    """Whether `chunked_loss` has changed `model`."""
    return isinstance(getattr(base_model(model), "_loss_function", None), ChunkedLoss)


def plain_loss(model: nn.Module) -> None:
    """Undo `chunked_loss`."""
    base: Any = base_model(model)
    if not isinstance(getattr(base, "_loss_function", None), ChunkedLoss):
        return
    base._loss_function = base._loss_function.original
    for module in base.modules():
        if isinstance(module, ChunkedHead):
            module.__class__ = nn.Linear  # type: ignore[assignment]
            module.__dict__.pop("_armed", None)
    for hooks in (base._forward_pre_hooks, base._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_arm, _disarm)]:
            for table in (hooks, base._forward_pre_hooks_with_kwargs, base._forward_hooks_always_called):
                table.pop(key, None)


def why_plain_head(head: nn.Module) -> str | None:
    """Why the loss of this head cannot be computed in chunks; None if it can."""
    if type(head) not in (nn.Linear, ChunkedHead):
        return f"the head is a {type(head).__name__}: adapted, quantized or of its own kind"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained (or tied to embeddings that are)"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        return "the head has hooks"
    if not all(is_plain(parameter) for parameter in head.parameters()):
        return "the head is sharded"
    return None


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _fits(head: nn.Linear, x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(x.device.type)
    wanted = torch.is_grad_enabled() or head.__dict__.get("_armed") == LAZY
    return wanted and x.device == head.weight.device and (autocast or x.dtype == head.weight.dtype)


def _arm(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    head = module.get_output_embeddings()
    loss = module._loss_function
    loss.training = module.training
    if type(head) is ChunkedHead:
        labelled = module.training and kwargs.get("labels") is not None
        head.__dict__["_armed"] = LAZY if LAZY in module.__dict__ else labelled


def _disarm(module: nn.Module, args: tuple, output: Any) -> None:
    head = module.get_output_embeddings()
    if type(head) is ChunkedHead:
        head.__dict__["_armed"] = False
