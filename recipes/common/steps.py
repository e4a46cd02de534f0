"""Steps of a run, each a `prefopt` command with a YAML file of settings; one that is finished is kept.

A second run of the command begins after the finished ones.
"""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_json, write_whole
from prefopt.recipes.common.arguments import parse, read_config
from prefopt.recipes.common.errors import collecting, raise_all


def command_line(config: Path | str, **keys: object) -> list[str]:
    """`--config FILE --key value ...`, as for a command."""
    return ["--config", str(config), *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]


class Commands:
    """Commands that run in this process as `prefopt <command> --config NAME.yaml --key value` would.

    Args:
        root: folder of the run.
        configs: folder with a YAML file for each of them.
        seed: of all of them, unless a step is given another.
    """

    # Step with a file -> the dataclasses of its keys.
    kinds: ClassVar[Mapping[str, Sequence[type]]]
    # A folder with files of all steps, to copy.
    recipe: ClassVar[str]

    def __init__(self, root: Path, configs: Path, seed: int) -> None:
        self.root, self.configs, self.seed = root, configs, seed

    def config(self, name: str) -> Path:
        """The settings of a step."""
        path = self.configs / f"{name}.yaml"
        if not path.is_file():
            raise UserError(
                f"config_dir {str(self.configs)!r} has no {path.name}; `prefopt recipes copy {self.recipe}` copies a "
                "folder that has all"
            )
        return path

    def arguments(self, name: str, **keys: object) -> tuple[Any, ...]:
        """What a step's command reads from its file and these keys."""
        path = str(self.config(name))
        return parse(self.kinds[name], command_line(path, **keys), path)

    def settings(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What each step's file says, all of them at once: a mistake in a later step would be met after an hour."""
        settings: dict[str, dict[str, Any]] = {}
        mistakes: list[str] = []
        for name in names:
            path = str(self.config(name))
            found: list[str] = []
            with collecting(found):
                settings[name] = read_config(path)
                known = {field.name for kind in self.kinds[name] for field in fields(kind)}
                output = "output" if "output" in known else "output_dir"
                self.arguments(name, **{output: self.root / name})
            mistakes += [text if path in text else f"{path}: {text}" for text in found]
        raise_all(mistakes)
        return settings

    def step(self, main: Callable[[list[str]], None], name: str, **keys: object) -> None:
        """Run one command with the file of its name."""
        main(command_line(self.config(name), **{"seed": self.seed, **keys}))

    def anew(self, main: Callable[[list[str]], None], name: str, *, output_dir: Path, **keys: object) -> None:
        """The same, without what a try of this step has left in its folder that did not end."""
        shutil.rmtree(output_dir, ignore_errors=True)
        self.step(main, name, output_dir=output_dir, **keys)


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
