"""Run named steps once each: a finished step is kept, and a second run of the command goes on after it."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from prefopt.evaluation.generate import write_whole
from prefopt.recipes.arguments import UserError


class Steps:
    """The steps of one run folder, each with a marker file written when it is done.

    `run(name, work, settings)` calls `work()` unless the marker is there. The marker holds the seconds the step took
    and a fingerprint of `settings`: a step that ran with other settings is never silently reused nor overwritten.
    """

    def __init__(self, folder: Path, total: int, console: Console | None = None) -> None:
        self.folder = folder
        self.total = total
        self.console = console or Console()
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()
        self._inputs = (
            ""  # fingerprint of everything that ran before, so that a change early on is noticed later
        )

    def run(self, name: str, title: str, settings: Any, work: Callable[[], None]) -> None:
        """Do one step, or skip it because it is done."""
        marker = self.folder / "steps" / f"{name}.json"
        text = self._inputs + json.dumps(settings, sort_keys=True, default=str)
        self._inputs = hashlib.sha256(text.encode()).hexdigest()[:16]
        heading = f"[{len(self.seconds) + 1}/{self.total}] {title}"
        if marker.exists():
            done = json.loads(marker.read_text(encoding="utf-8"))
            if done["settings"] != self._inputs:
                raise UserError(
                    f"step {name!r} of {self.folder} ran with other settings; choose another output_dir, or delete "
                    f"{self.folder} to run everything again"
                )
            self.seconds[name] = done["seconds"]
            self.console.print(f"{heading}: done before ({done['seconds']:.0f} s)")
            return
        elapsed = time.monotonic() - self._started
        self.console.rule(f"{heading}  ({elapsed / 60:.1f} min so far)", align="left")
        start = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - start, 2)
        write_whole(marker, json.dumps({"settings": self._inputs, "seconds": self.seconds[name]}))
        self.console.print(f"{heading}: {self.seconds[name]:.0f} s")
