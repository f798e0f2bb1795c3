"""The methods: a file or a folder each, with the same names in every folder (config, layer, model).

`catalogue` finds one by its name, `configs` makes its peft config for a model, `beside` is the base of those that hang
beside a module. To add a method, see CONTRIBUTING.md; one of your own needs no fork (`adapters_kit.registry`).
"""

import sys
from types import ModuleType

from adapters_kit.methods.catalogue import find_method, table
from adapters_kit.registry import Method

__all__ = ["find_method", "table"]


class _Room(ModuleType):
    """`ak.methods` is this package, and calling it gives the table: one name for both."""

    def __call__(self) -> list[Method]:
        return table()


sys.modules[__name__].__class__ = _Room
