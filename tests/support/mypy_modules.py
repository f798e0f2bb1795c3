"""A plugin of mypy: what torch's `Module.__getattr__` gives is of any type.

torch says `Tensor | Module`. On the models of others it is as often a config, a method or a number, so that every
`model.config` would need a cast. Attributes that a class declares keep their types.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

MODULE = "torch.nn.modules.module.Module."


class Modules(Plugin):
    """Widens attributes that only `Module.__getattr__` knows."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """The hook for `fullname`, a class and an attribute of it; None where mypy's own answer stands."""
        return widened if fullname.startswith(MODULE) else None


def widened(context: AttributeContext) -> Type:
    """Any in the place of `Tensor | Module`; declared attributes as they are."""
    if str(context.default_attr_type) == "torch._tensor.Tensor | torch.nn.modules.module.Module":
        return AnyType(TypeOfAny.special_form)
    return context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    """What mypy calls."""
    return Modules
