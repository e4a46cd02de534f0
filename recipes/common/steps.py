"""Run named steps once each: a finished step is kept, and a second run of the command begins after it."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_json, write_whole


class Steps:
    """The steps of one run folder, which is theirs alone, each with a marker file written when it is done.

    `run(name, title, settings, work)` calls `work()` unless the marker is there. The marker holds the seconds the
    step took and a fingerprint of its settings and of the steps before it: a step that ran with other settings, or
    on other inputs, is never silently reused nor overwritten.

    Raises:
        UserError: the folder holds what no steps have written, which they would overwrite.
    """

    def __init__(self, folder: Path, total: int) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output_dir: {folder} is a file; name a folder")
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if there and not (folder / "steps").is_dir():
            raise UserError(
                f"output_dir: {folder} is of no earlier run of this command and holds {there[0]}"
                f"{f' and {len(there) - 1} more' if len(there) > 1 else ''}; choose another output_dir"
            )
        # Before anything else is written there, so that a run killed at once can go on.
        (folder / "steps").mkdir(parents=True, exist_ok=True)
        self.folder, self.total = folder, total
        self.console = Console()
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()
        # Fingerprint of everything that ran before, so that a change early on is noticed later.
        self._inputs = ""

    def run(self, name: str, title: str, settings: Any, work: Callable[[], None]) -> None:
        """Do one step, or skip it because it is done."""
        marker = self.folder / "steps" / f"{name}.json"
        text = self._inputs + json.dumps(settings, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        heading = f"[{len(self.seconds) + 1}/{self.total}] {title}"
        if marker.exists():
            done = read_json(marker, "fingerprint", "run", "seconds")
            if done["fingerprint"] != fingerprint:
                raise UserError(
                    f"step {name!r} of {self.folder} ran with other settings or before an earlier step ran again; "
                    f"choose another output_dir, or delete {marker} (and the later ones) to run it again"
                )
            self._inputs = done["run"]
            self.seconds[name] = done["seconds"]
            self.console.print(f"{heading}: done before ({done['seconds']:.0f} s)")
            return
        elapsed = time.monotonic() - self._started
        self.console.rule(f"{heading}  ({elapsed / 60:.1f} min so far)", align="left")
        start = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - start, 2)
        self._inputs = uuid.uuid4().hex
        done = {"fingerprint": fingerprint, "run": self._inputs, "seconds": self.seconds[name]}
        write_whole(marker, json.dumps(done))
        self.console.print(f"{heading}: {self.seconds[name]:.0f} s")
