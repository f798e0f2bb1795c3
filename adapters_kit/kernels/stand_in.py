"""Stand-ins for a tensor whose usual next use needs less than its value: `LazyLogits`, `PendingActivation`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_OPERATORS = (
    *("getitem", "len", "iter", "neg", "abs", "lt", "le", "gt", "ge"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "matmul", "rmatmul"),
)


class StandIn:
    """Becomes the tensor that `make` returns, unless the subclass answers an operation itself."""

    def make(self) -> Tensor:
        """The value; computed at every call."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*[_made(item) for item in args], **{name: _made(item) for name, item in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling ask for dunders before there is anything to make a value of.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.make(), name)


def _made(item: Any) -> Any:
    if isinstance(item, StandIn):
        return item.make()
    return type(item)([_made(one) for one in item]) if type(item) in (list, tuple) else item


def _of_the_value(name: str) -> Callable:
    return lambda self, *others: getattr(self.make(), name)(*[_made(other) for other in others])


# Python looks operators up on the class, past __getattr__.
for _name in _OPERATORS:
    setattr(StandIn, f"__{_name}__", _of_the_value(f"__{_name}__"))
