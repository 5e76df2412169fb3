"""A rank program of one long stage: rank 0 works for some seconds, rank 1 waits for it silently.

The attempt number is the seconds; rank 0 shows signs of life unless the stage is "silent".
"""

from __future__ import annotations

import argparse
import os
import time

from deepclust.launch.role import die_with
from deepclust.run.reporting import PipeReport
from deepclust.run.signs import BEAT_S


def main() -> None:
    """Do the stage, as `deepclust.launch.worker` would."""
    parser = argparse.ArgumentParser()
    for name in ("--run", "--token", "--rendezvous", "--stage", "--gpu", "--threads", "--size"):
        parser.add_argument(name)
    for name in ("--attempt", "--rank", "--parent", "--pipe"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    die_with(args.parent)
    report = PipeReport(args.pipe)
    report.alive()
    time.sleep(1.5 * BEAT_S)  # until the supervisor knows that we have begun
    report.event("training", rank=args.rank, pid=os.getpid())
    deadline = time.monotonic() + args.attempt
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if args.rank == 0 and args.stage != "silent":
            report.alive()
    report.done()


if __name__ == "__main__":
    main()
