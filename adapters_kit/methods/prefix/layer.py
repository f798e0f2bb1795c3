"""The prefixes of one attention module: a peft tuner layer that sits inside it as the child `kv_prefix`."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from adapters_kit.methods.beside import BesideLayer, Rows
from adapters_kit.methods.prefix.attention import CHILD, Prefix, original_config, view_config
from adapters_kit.methods.prefix.config import SMALL_STD, PrefixConfig


class PrefixLayer(BesideLayer):
    """Holds one prefix for each adapter and hands the active ones to the attention function.

    It wraps nothing: the attention module keeps its class, its path and its children, so that LoRA or any other method
    finds its targets where they always were.

    Attributes:
        prefix_key: adapter -> (tokens, key/value heads, key width).
        prefix_value: adapter -> (tokens, key/value heads, value width).
        prefix_embedding, prefix_down, prefix_up: adapter -> the MLP that writes both, if `prefix_projection`.
        prefix_gate: adapter -> a linear to one score for each token, if `gate`.
    """

    adapter_layer_names = (
        "prefix_key",
        "prefix_value",
        "prefix_embedding",
        "prefix_down",
        "prefix_up",
        "prefix_gate",
    )
    not_mergeable = "A prefix adds keys and values to attention, which no weight of the base model can take in."
    # Keys count through a softmax that divides them by the root of their width: at the values' rate they lag behind
    # (docs/defaults.md). `training.build_optimizer` multiplies with it.
    rate_factors: ClassVar = {"prefix_key": 4.0}

    def __init__(self, attention: nn.Module, shape: list[int]) -> None:
        super().__init__()
        self.prefix_key = nn.ParameterDict()
        self.prefix_value = nn.ParameterDict()
        self.prefix_embedding = nn.ParameterDict()
        self.prefix_down = nn.ModuleDict()
        self.prefix_up = nn.ModuleDict()
        self.prefix_gate = nn.ModuleDict()
        *self.shape, self.hidden_size = shape
        # In a tuple, because torch would register the attention as a child of its own child.
        self._home = (attention,)
        self._gate_hook: Any = None
        self._hidden: torch.Tensor | None = None

    @property
    def home(self) -> nn.Module:
        """The attention module that this layer belongs to."""
        return self._home[0]

    def attach(self) -> None:
        """Become a child of the attention module and let its attention go through the prefix function."""
        attention = self.home
        setattr(attention, CHILD, self)
        attention.config = view_config(attention.config, self)

    def detach(self) -> None:
        """Leave the attention module as it was before `attach`."""
        attention = self.home
        delattr(attention, CHILD)
        attention.config = original_config(attention.config)
        if self._gate_hook is not None:
            self._gate_hook.remove()

    def update_layer(
        self,
        adapter_name: str,
        config: PrefixConfig,
        start: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add a prefix.

        Args:
            adapter_name: its name.
            config: its options.
            start: keys and values to start from, each fp32 (tokens, heads, width) on the CPU; None for small random
                ones, or for an MLP as torch draws it.
        """
        heads, key_width, value_width = self.shape
        tokens, width = config.num_virtual_tokens, config.projection_hidden_size
        if config.prefix_projection:
            self.prefix_embedding[adapter_name] = nn.Parameter(torch.randn(tokens, width))
            self.prefix_down[adapter_name] = nn.Linear(width, width)
            self.prefix_up[adapter_name] = nn.Linear(width, heads * (key_width + value_width))
            if start is not None:
                self._let_mlp_write(adapter_name, torch.cat(start, dim=-1).flatten(1))
        else:
            if start is None:
                spread = config.init_std or SMALL_STD
                key, value = (torch.randn(tokens, heads, size) * spread for size in (key_width, value_width))
            else:
                key, value = start
            self.prefix_key[adapter_name], self.prefix_value[adapter_name] = nn.Parameter(key), nn.Parameter(value)
        if config.gate:
            self.prefix_gate[adapter_name] = gate = nn.Linear(self.hidden_size, 1)
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)
            self._watch_input()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _let_mlp_write(self, adapter_name: str, rows: torch.Tensor) -> None:
        """Set the last layer of a fresh MLP so that it writes `rows` (tokens, heads · both widths).

        The smallest such weights: exact up to as many tokens as the MLP is wide, least squares beyond.
        """
        embedding, down, up = (part[adapter_name] for part in (self.prefix_embedding, self.prefix_down, self.prefix_up))
        up.bias.copy_(rows.mean(0))
        up.weight.copy_(torch.linalg.lstsq(torch.tanh(down(embedding)), rows - up.bias, driver="gelsd").solution.T)

    def vectors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys (tokens, heads, key width) and values (tokens, heads, value width) of one adapter."""
        if adapter_name in self.prefix_key:
            return self.prefix_key[adapter_name], self.prefix_value[adapter_name]
        heads, key_width, value_width = self.shape
        embedding, down, up = (part[adapter_name] for part in (self.prefix_embedding, self.prefix_down, self.prefix_up))
        both = up(torch.tanh(down(embedding))).view(-1, heads, key_width + value_width)
        return both.split((key_width, value_width), dim=-1)

    def eject(self, adapter_name: str) -> bool:
        """Replace the MLP of one adapter by the keys and values that it writes; False if it has none here."""
        if adapter_name not in self.prefix_up:
            return False
        trained = self.prefix_up[adapter_name].weight.requires_grad
        with torch.no_grad():
            key, value = self.vectors(adapter_name)
        self.prefix_key[adapter_name] = nn.Parameter(key.clone(), requires_grad=trained)
        self.prefix_value[adapter_name] = nn.Parameter(value.clone(), requires_grad=trained)
        for part in (self.prefix_embedding, self.prefix_down, self.prefix_up):
            del part[adapter_name]
        return True

    @property
    def idle(self) -> bool:
        """Whether attention runs exactly as in the base model."""
        if self._disable_adapters:
            return True
        return not self._present(self.active_adapters if self.rows is None else self.rows.names)

    def _present(self, names: Iterable[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if name in self.prefix_key or name in self.prefix_up]

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> Prefix:
        """What the attention function joins, for queries and keys (batch, heads, tokens, width)."""
        names = self._present(self.active_adapters if self.rows is None else self.rows.names)
        parts = [self.vectors(name) for name in names]
        device = key.device
        keys = torch.cat([part[0].transpose(0, 1) for part in parts], dim=1)[None].to(device)
        values = torch.cat([part[1].transpose(0, 1) for part in parts], dim=1)[None].to(device)
        visible = None if self.rows is None else self._visible(self.rows, names, parts, key)
        return Prefix(keys, values, visible, self._bias(names, parts, query))

    @staticmethod
    def _visible(rows: Rows, names: list[str], parts: list[Any], key: torch.Tensor) -> torch.Tensor:
        """Which prefix tokens each row sees: (batch, prefix tokens), bool."""
        owners = [name for name, part in zip(names, parts, strict=True) for _ in range(part[0].shape[0])]
        return torch.tensor([[row == owner for owner in owners] for row in rows.of(len(key))], device=key.device)

    def _bias(self, names: list[str], parts: list[Any], query: torch.Tensor) -> torch.Tensor | None:
        if not any(name in self.prefix_gate for name in names):
            return None
        shape = (query.shape[0], 1, query.shape[2])
        columns = []
        for name, part in zip(names, parts, strict=True):
            score = torch.zeros(shape, device=query.device)
            if name in self.prefix_gate:
                gate = self.prefix_gate[name]
                assert self._hidden is not None  # remembered when the attention was entered
                hidden = self._hidden.to(gate.weight.dtype)
                # The log of the gate, added to scores, multiplies the weight that softmax gives to the prefix.
                score = nn.functional.logsigmoid(gate(hidden)).squeeze(-1).view(shape)
            columns.append(score[..., None].expand(*shape, part[0].shape[0]))
        self._hidden = None
        return torch.cat(columns, dim=-1)

    def _watch_input(self) -> None:
        if self._gate_hook is None:
            self._gate_hook = self.home.register_forward_pre_hook(_remember_input, with_kwargs=True)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        own = {id(parameter) for parameter in self.parameters()}
        base = next((p for p in self.home.parameters() if id(p) not in own and p.device.type != "meta"), None)
        device = device or (base.device if base is not None else None)
        if device is None:
            return
        for name in self.adapter_layer_names:
            part = getattr(self, name)
            if adapter_name in part and not any(p.device.type == "meta" for p in part.parameters()):
                part[adapter_name] = part[adapter_name].to(device)

    def extra_repr(self) -> str:
        """Its shape, in the model's printed form."""
        heads, key_width, value_width = self.shape
        return f"heads={heads}, key_width={key_width}, value_width={value_width}"


def _remember_input(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    layer = getattr(attention, CHILD, None)
    if layer is not None:
        layer._hidden = args[0] if args else kwargs["hidden_states"]
