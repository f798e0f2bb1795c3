"""The command line under a launcher: `launched.py SEEN [--fail-at STEP] train …` writes to SEEN what is sharded."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from adapters_kit import cli
from adapters_kit.training import loop
from adapters_kit.training.callbacks import Meter


def main(arguments: list[str]) -> int:
    """Runs the command with the rest of the arguments."""
    seen, arguments = Path(arguments[0]), arguments[1:]
    fail_at = None
    if arguments[0] == "--fail-at":
        fail_at, arguments = int(arguments[1]), arguments[2:]
    run_epoch, on_step_end = loop.AdapterTrainer._run_epoch, Meter.on_step_end

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(self.model.parameters())
        if os.environ["RANK"] == "0":
            seen.write_text(json.dumps([sum(isinstance(one, DTensor) for one in parameters), len(parameters)]))
        return run_epoch(self, *args, **kwargs)

    def failing(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == fail_at:
            raise RuntimeError("stopped by the test")
        on_step_end(self, args, state, control, **kwargs)

    loop.AdapterTrainer._run_epoch = watched  # type: ignore[method-assign]
    Meter.on_step_end = failing  # type: ignore[method-assign]
    return cli.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
