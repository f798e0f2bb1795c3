"""`BlocksConfig`: which of the numbers that a block stores are trained, and how."""

from dataclasses import dataclass, field

from peft import PeftConfig

from adapters_kit.errors import AdapterError
from adapters_kit.kernels.ggml import FORMATS
from adapters_kit.peft_plugin import peft_type

TRAINED = ("auto", "minima", "scales", "both")
BLOCKS = peft_type("blocks")


@dataclass
class BlocksConfig(PeftConfig):
    """Train m, d or both of `W = d · u + m · v` in a GGUF file's blocks; the codes u and v stay.

    Raises:
        AdapterError: a value that means nothing.
    """

    train: str = field(
        default="auto",
        metadata={
            "help": "'minima': m (QA-LoRA, arXiv:2309.14717); 'scales': d (PEQA, arXiv:2305.14152); 'both'. Layers "
            "whose format stores no m keep it untrained; 'auto': the minima of layers that store them, the scales of "
            "the others"
        },
    )
    r: int | None = field(
        default=16, metadata={"help": "rank of the change, a matrix of out × blocks; None: every number by itself"}
    )
    scale_factor: float = field(
        default=0.1,
        metadata={"help": "the change of d, as a share of d, is this times the trained matrix: scales learn slower"},
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression; filled in: every linear in blocks that can"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "not these"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "trained and saved in full: a task head"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BLOCKS
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(self.target_modules)
        if self.train not in TRAINED:
            raise AdapterError(f"train={self.train!r}: choose {', '.join(map(repr, TRAINED))}.")
        if self.r is not None and (not isinstance(self.r, int) or self.r < 1):
            raise AdapterError(f"r={self.r!r} is no rank: give a whole number above 0, or None for full matrices.")

    def fields(self, kind: int) -> tuple[str, ...]:
        """Of "minima" and "scales", what is trained of a layer in blocks of the ggml type `kind`."""
        places = {"minima": FORMATS[kind].minimum, "scales": FORMATS[kind].scale}
        there = tuple(name for name, place in places.items() if place is not None)
        if self.train == "auto":
            return there[:1]
        return tuple(name for name in there if self.train in (name, "both"))
