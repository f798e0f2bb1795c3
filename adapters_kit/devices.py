"""The accelerator of this machine, by whatever name torch knows it: NVIDIA, AMD, Intel, Apple, or none.

The one file that calls a kind of device by its name. Where torch asks all of them in one way (`torch.accelerator`), so
does this; what one of them cannot say is answered as for a machine without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# What torch says of a device that has no such thing: no counters of memory on Apple's, no streams on some.
_LACKS = (NotImplementedError, AttributeError, RuntimeError, AssertionError)
# Before a command: it sees the first NVIDIA (or AMD) GPU alone.
ONE_ALONE = "CUDA_VISIBLE_DEVICES=0"
# Memory that is not paged out can be copied from while the host goes on.
_PINS = ("cuda", "xpu")


def accelerator() -> torch.device | None:
    """The device that models are put on, with its number; None without one. Asks the driver."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return None if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def best() -> torch.device:
    """The accelerator, or the CPU."""
    return accelerator() or torch.device("cpu")


def may_have_one() -> bool:
    """Whether this torch was built for an accelerator, be one there or not. Asks no driver, so a process may fork."""
    return torch.accelerator.current_accelerator(check_available=False) is not None


def count() -> int:
    """How many accelerators this process sees."""
    return torch.accelerator.device_count() if accelerator() is not None else 0


def names() -> list[str]:
    """Of all that this process sees."""
    module = _module()
    if module is None:
        return []
    if not hasattr(module, "get_device_name"):
        return ["Apple GPU"] * count()
    return [module.get_device_name(index) for index in range(count())]


def memory() -> list[int]:
    """Bytes of each, as it is sold; [] where they cannot be told."""
    module = _module()
    if not hasattr(module, "get_device_properties"):
        return []
    return [module.get_device_properties(index).total_memory for index in range(count())]


def free_memory() -> int | None:
    """Bytes that are free on the accelerator; None without one, or where it does not tell."""
    here = accelerator()
    if here is None:
        return None
    if here.type == "mps":  # memory of the machine, of which Metal recommends a part
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        return torch.accelerator.get_memory_info(here)[0]
    except _LACKS:
        return None


def peak_memory() -> int | None:
    """The most bytes that torch has held there since `forget_peak`; None without an accelerator."""
    if accelerator() is None:
        return None
    try:
        return torch.accelerator.max_memory_allocated()
    except _LACKS:
        return None


def forget_peak() -> None:
    """The peak counts from now on."""
    if accelerator() is not None:
        try:
            torch.accelerator.reset_peak_memory_stats()
        except _LACKS:
            return


def empty_cache() -> None:
    """What torch holds there and does not use is given back, so that pieces of another size can be had."""
    if accelerator() is not None:
        torch.accelerator.empty_cache()


def synchronize() -> None:
    """Waits until all that was asked of the accelerator is done: before a clock is read."""
    if accelerator() is not None:
        torch.accelerator.synchronize()


def has_bf16() -> bool:
    """Whether the accelerator multiplies bf16 itself. False for cards older than Ampere, which imitate it slowly."""
    here = accelerator()
    if here is None:
        return False
    if here.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    check = getattr(_module(), "is_bf16_supported", None)
    return bool(check()) if check is not None else here.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def pins() -> bool:
    """Whether batches are worth pinning, so that copying them keeps nobody waiting."""
    here = accelerator()
    return here is not None and here.type in _PINS


def stores_float32(x: Tensor) -> bool:
    """Whether a product of 16-bit tensors beside `x` may be asked for in float32, as it was accumulated."""
    return x.device.type == "cuda"


def quantizes_at_start() -> bool:
    """Whether peft's LoftQ, which asks for CUDA by name, can run."""
    here = accelerator()
    return here is not None and here.type == "cuda"


def with_generator(device: torch.device) -> dict[str, Any]:
    """What `torch.random.fork_rng` has to be told, so that random numbers drawn on `device` leave no trace."""
    if device.type in ("cpu", "meta"):
        return {"devices": []}
    return {"devices": [device.index or 0], "device_type": device.type}


Generators = tuple[Tensor, list[Tensor]]


def random_state() -> Generators:
    """The state of torch's generators: the CPU's, and each accelerator's where one has been used."""
    module = _module()
    if module is None or not getattr(module, "is_initialized", lambda: True)():
        return torch.get_rng_state(), []
    if hasattr(module, "get_rng_state_all"):
        return torch.get_rng_state(), module.get_rng_state_all()
    return torch.get_rng_state(), [module.get_rng_state()]


def set_random_state(state: Generators) -> None:
    """Puts torch's generators where they were."""
    torch.set_rng_state(state[0])
    module = _module()
    if state[1] and module is not None:
        if hasattr(module, "set_rng_state_all"):
            module.set_rng_state_all(state[1])
        else:
            module.set_rng_state(state[1][0])


@contextmanager
def quick_float32(allowed: bool) -> Iterator[None]:
    """Inside, an accelerator may round the factors of float32 products to ten bits (TF32), as bf16 does to seven.

    Args:
        allowed: whether anything is changed: for a training in 16 bit, of whose products few are in float32.
    """
    before = torch.get_float32_matmul_precision()
    if not allowed or accelerator() is None or before != "highest":
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _module() -> Any:
    here = accelerator()
    return None if here is None else torch.get_device_module(here)
