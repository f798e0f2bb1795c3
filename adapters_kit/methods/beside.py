"""What hangs beside a module: the base of bottleneck adapters, prefixes, and of a method of yours.

Such a method leaves every module of the model in its place. Its layer is a child of the module that it changes, found
by a hook or by the attention function, so no path moves and other methods find their targets where they always were.
Nothing of it can be merged into a weight. Here is what all of them share: the config's note in the model card, rows of
different adapters in one batch, saving, and the words that refuse a merge.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from adapters_kit.artifacts import card
from adapters_kit.artifacts.files import write_text
from adapters_kit.errors import AdapterError, UnknownNameError, did_you_mean

BASE = "__base__"  # peft's word for a row without an adapter

_NOTE = """
> **Loading this adapter** needs `adapters_kit` beside peft: `pip install adapters-kit`, then `import adapters_kit`
> before `PeftModel.from_pretrained` or `AutoModel….from_pretrained`. Without it peft raises `KeyError: '{kind}'`.
"""


@dataclass
class OwnConfig(PeftConfig):
    """The config of a method that peft knows only while adapters_kit is imported. What it saves says so."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As peft's, with a note in the folder's model card: without the package peft stops at a bare KeyError."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "README.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
        write_text(path, card.with_note(text, _NOTE.format(kind=self.peft_type.value)))


@dataclass
class BesideConfig(OwnConfig):
    """The config of a method that hangs beside modules; combinations take it as a part."""


@dataclass(frozen=True)
class Rows:
    """Which adapter each row of a mixed batch uses.

    Attributes:
        names: one a row of the input, "__base__" for none.
        expand: how often `generate` repeats each row, one after the other, for beams or samples.
    """

    names: tuple[str, ...]
    expand: int = 1

    def of(self, count: int) -> list[str]:
        """The names of `count` rows: those of the input (an encoder sees them so), or of the repeated ones.

        Raises:
            AdapterError: any other count.
        """
        if count == len(self.names):
            return list(self.names)
        if count == self.expand * len(self.names):
            return [name for name in self.names for _ in range(self.expand)]
        raise AdapterError(
            f"adapter_names has {len(self.names)} entries for {count} rows; give one for each row. Models that put "
            "time before rows inside (XLNet) cannot mix adapters in a batch."
        )


class BesideLayer(nn.Module, BaseTunerLayer):
    """The adapters that one module of the base model carries.

    A subclass names its containers in `adapter_layer_names`, each adapter name -> parameters, and defines
    `_move_adapter_to_device_of_base_layer`.

    Attributes:
        not_mergeable: why no weight takes it in, a sentence; said when someone tries.
        rows: the adapters of a mixed batch, while one runs.
    """

    not_mergeable: ClassVar[str]
    _nothing: ClassVar[nn.Module] = nn.Identity()

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows | None = None
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def get_base_layer(self) -> nn.Module:
        """peft asks every adapter layer for the module it replaced; this one replaced none."""
        return self._nothing

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused with the reason."""
        raise AdapterError(self.refusal())

    def unmerge(self) -> None:
        """Nothing was ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """It is no update of a weight, so it has no low-rank form."""
        return False

    @classmethod
    def refusal(cls) -> str:
        """Why it is not merged, and what to do instead."""
        return f"{cls.not_mergeable} Ship the adapter beside the base model; `unload()` takes it off again."


class BesideModel(BaseTuner):
    """The peft tuner of such a method.

    A subclass names its `prefix`, which its parameters start with, and its `layer_class`, and defines
    `_check_target_module_exists`, `_create_and_replace` and `detach_from`. Mixed models call `_prepare_model` and
    `_create_and_replace` with themselves as `self`: only the arguments and `self.model` can be relied on there.
    """

    layer_class: ClassVar[type[BesideLayer]]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's interface; places are found by structure

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Only task heads are ever put back. peft's own version copies `.weight`, which a head of several layers lacks.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with mixed_batch(self.model, self.peft_config, kwargs):
            yield

    @classmethod
    def refuse_merge(cls) -> None:
        """Raise the reason why nothing of this method can be merged."""
        raise AdapterError(cls.layer_class.refusal())

    def _check_merge_allowed(self) -> None:
        self.refuse_merge()

    @staticmethod
    def detach_from(model: nn.Module) -> None:
        """Take every layer of this method off `model`."""
        raise NotImplementedError

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self.refuse_merge()
        self.detach_from(self.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


@contextmanager
def mixed_batch(model: nn.Module, adapters: Iterable[str], call: dict[str, Any]) -> Iterator[None]:
    """For the length of one forward or generate, each row uses the adapter that `adapter_names` gives it.

    Args:
        model: the base model with its adapter layers inside.
        adapters: the names that exist.
        call: the keyword arguments of that forward or generate; without `adapter_names` nothing happens.

    Raises:
        UnknownNameError: a name that is no adapter.
        AdapterError: the model is in training mode.
    """
    names = call.get("adapter_names")
    if names is None:
        yield
        return
    check_rows(names, adapters)
    if model.training:
        raise AdapterError("adapter_names works in eval mode only: call model.eval() first.")
    rows = Rows(tuple(names), _expansion(model, call))
    layers = [module for module in model.modules() if isinstance(module, BesideLayer)]
    handles = []

    def name_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
        return args, {**kwargs, "adapter_names": rows.of(len(hidden))}

    try:
        for layer in layers:
            layer.rows = rows
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(name_rows, with_kwargs=True))
        yield
    finally:
        for layer in layers:
            layer.rows = None
        for handle in handles:
            handle.remove()


def check_rows(names: Iterable[str], adapters: Iterable[str]) -> None:
    """Refuse a row's name that is no adapter."""
    known = [BASE, *adapters]
    for name in names:
        if name not in known:
            raise UnknownNameError(f"adapter_names: there is no adapter {name!r}. {did_you_mean(str(name), known)}")


def _expansion(model: nn.Module, call: dict[str, Any]) -> int:
    """How often `generate` repeats a row; the call itself counts before its generation config, and that before the
    model's own."""

    def wanted(option: str) -> int:
        places = (call.get("generation_config"), getattr(model, "generation_config", None))
        given = [call.get(option), *(getattr(place, option, None) for place in places)]
        return next((value for value in given if isinstance(value, int)), 1)

    return max(wanted("num_beams"), wanted("num_return_sequences"))


def chosen_rows(names: Sequence[str], name: str, device: torch.device) -> torch.Tensor:
    """The numbers of the rows that use `name`: (rows,), int64."""
    return torch.tensor([number for number, other in enumerate(names) if other == name], device=device)
