"""Does prefopt work on this GPU, and what does it gain there? One table and a line of JSON, within 8 minutes.

    prefopt gpu-check
    prefopt gpu-check --only attention reward          # some of the checks

Random models are built in code; nothing is downloaded and no file is left. Correctness has a verdict and its tolerance,
speed and memory are figures with their bound. What the card's memory or the time does not allow is listed with its
reason. The exit status is 1 if something failed. Without a GPU everything runs in miniature on the CPU, whose figures say
nothing. docs/gpu.md says what each line is.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from typing import Any

from prefopt.gpu.lines import FAILED, HEADER, NOT_RUN, Line, summary
from prefopt.gpu.run import CHECKS, run


def main(argv: list[str] | None = None) -> None:
    """Run the checks; SystemExit(1) if one failed."""
    parser = argparse.ArgumentParser(
        "prefopt gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*CHECKS], default=[*CHECKS], help="checks to run")
    names = parser.parse_args(argv).only
    start = time.monotonic()
    folder = tempfile.mkdtemp(prefix="prefopt-gpu-check-")
    failed: list[Line] = []

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def meet(machine: dict[str, Any]) -> None:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        print(f"{machine['name']}, {machine['memory_gib']} GiB; {versions}")
        if machine["miniature"]:
            print("no GPU: a miniature of the checks on the CPU, whose times say nothing")
        print(HEADER, flush=True)

    def show(line: Line) -> None:
        print(line, flush=True)

    say("starting: torch and the trainers are imported")
    try:
        machine, lines = run(names, meet, show, say, log=os.path.join(folder, "log.txt"))
        failed += [line for line in lines if line.verdict == FAILED]
    finally:
        if not failed:
            shutil.rmtree(folder)
    print(f"{len(failed)} failed, {sum(line.verdict == NOT_RUN for line in lines)} not run")
    if failed:
        print(f"what the checks printed, with tracebacks: {folder}", file=sys.stderr)
    print(summary(machine, lines, time.monotonic() - start), flush=True)
    if failed or not machine:
        raise SystemExit(1)
