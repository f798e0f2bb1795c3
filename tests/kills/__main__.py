"""make kills: what survives when the process is killed or the disk is full, at every write. Prints what it tried.

Every trial runs in a forked child, so that SIGKILL is SIGKILL: no `finally` runs. The n-th write of the child kills it,
or fails as on a full disk; then the same call is made again (and stopped again in every fourth trial), and must end
with the bytes of a run that was never stopped. Kinds marked `every` meet a full disk at each of their writes, and where
mounting is allowed real disks of each size on which one of these writes no longer fits. Those trials and the others
take turns until the time is over: `python -m tests.kills --minutes 20`. Their order is always the same, so that
`--skip 30` goes on where a call ended that made thirty of each.

`--copies` meets every write of a kind in a few calls: the disk is copied at each, a fork meets a full disk, and what
is left differently is gone on from once (see copies).

A trial is cheap: whatever a run imports is imported before the first fork, pictures are written but not drawn, and the
cells of a comparison are forks of the trial. Limits are of CPU time, since other work on the machine is no fault.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

from tests.kills.child import SmallDisk
from tests.kills.kinds import kinds
from tests.kills.trials import Trials

DONE = object()


def main() -> int:
    """Takes turns until the time is over; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--most", type=int, help="trials of each kind; all of its writes if not given")
    parser.add_argument("--skip", type=int, default=0, help="trials of each kind that an earlier call made")
    parser.add_argument("--only", default="", help="kinds whose names begin so, with commas between")
    parser.add_argument(
        "--copies", action="store_true", help="every write of each kind, from copies of the disk (quick)"
    )
    options = parser.parse_args()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))  # the trial at hand is the last one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    begun = time.monotonic()
    faults: list[str] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        starts = tuple(options.only.split(","))
        chosen = [kind for kind in kinds(Path(folder)) if kind.name.startswith(starts)]
        disk = SmallDisk(Path(folder) / "disk")
        shared = (Path(folder), disk, options.most, options.skip)
        trials = [Trials(kind, *shared, Counter(), faults, notes) for kind in chosen]
        queues = [deque(one.full_disks() for one in trials), deque(one.stops() for one in trials)]
        if options.copies:
            queues = [deque(one.copied() for one in trials)]
        seen = 0
        while any(queues) and not stopped and time.monotonic() - begun < 60 * options.minutes:
            for waiting in filter(None, queues):
                turn = waiting.popleft()
                if next(turn, DONE) is not DONE:
                    waiting.append(turn)
            for fault in faults[seen:]:
                print(f"{fault}", flush=True)
            seen = len(faults)
        disk.close()
    total: Counter[str] = Counter()
    for one in trials:
        counts = one.counts
        total += counts
        print(f"{one.kind.name:<40}" + "  ".join(f"{what}: {count}" for what, count in sorted(counts.items())))
    print("all".ljust(40) + "  ".join(f"{what}: {count}" for what, count in sorted(total.items())))
    print("\n".join(["refused:", *notes]))
    print("small disks: " + ("tried" if disk.is_there else "mounting is not allowed here"))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.monotonic() - begun:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU")
    print("\n".join(["faults:", *faults]) if faults else "nothing was lost")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
