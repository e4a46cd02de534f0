"""Blinding: which text a labeler saw at which place, kept in a key that stays with whoever asked for the labels.

What labelers get holds the number of a task and its texts in a shuffled order, nothing else: no names of models, no
other field of a row, no seed. Everything needed to undo the shuffling is in the key, so that a labeler who opens the
file in an editor learns nothing about where a text came from. Without the key answers cannot be read: keep it.

Texts that are equal are shown once; what is said of a text holds for every completion that has it.
"""

import hashlib
import json
import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_jsonl, write_jsonl, write_whole
from prefopt.rankings.checks import ranks_problem, row_problem, shorten

KEY_FORMAT = "prefopt-label-key"
MIN_OUTPUTS, MAX_OUTPUTS = 2, 9
Shown = str | list[list[str]]  # a text, or [role, text] of each message


@dataclass(frozen=True)
class Task:
    """One prompt and the outputs to rank, with what undoes the blinding.

    `shows[i]` are the numbers of the completions whose text stands at place i. `expected`, of screening tasks alone,
    are the known ranks of the row's completions.
    """

    id: str
    row: Mapping[str, Any]
    shows: tuple[tuple[int, ...], ...]
    expected: tuple[int, ...] | None = None

    @property
    def prompt(self) -> Shown:
        return shown(self.row["prompt"])

    @property
    def outputs(self) -> list[Shown]:
        return [shown(self.row["completions"][places[0]]) for places in self.shows]

    @property
    def is_screening(self) -> bool:
        return self.expected is not None

    def per_completion(self, per_place: Sequence[Any]) -> list[Any]:
        """What was said by shown place, in the order of the row's completions.

        >>> Task("1", {}, shows=((2,), (0, 1))).per_completion(["worse", "better"])
        ['better', 'better', 'worse']
        """
        found = {i: said for places, said in zip(self.shows, per_place, strict=True) for i in places}
        return [found[i] for i in range(len(found))]


@dataclass(frozen=True)
class Key:
    """All tasks of one sheet. `sheet` is a digest of what it shows and to which group of labelers."""

    sheet: str
    tasks: Mapping[str, Task]
    seed: int
    group: str | None = None


def blind(
    rows: Iterable[Mapping[str, Any]],
    *,
    seed: int | None = None,
    screening: Iterable[Mapping[str, Any]] = (),
    group: str | None = None,
    source: str = "samples",
    screening_source: str = "screening",
) -> tuple[Key, int]:
    """Tasks in the order of the rows, outputs shuffled; and how many rows were left out, as their completions are one text.

    Args:
        rows: `prompt` and `completions`; other fields go into the key and come back with the labels.
        seed: of the shuffling. None draws one, which goes into the key: a seed that a labeler can guess together with
            samples in a telling order would undo the blinding.
        screening: ranked rows with a known answer, spread among the others at random.
        group: name of the labelers' group, e.g. "train" or "heldout".

    Raises:
        UserError: "SOURCE row 12: field 'completions': expected ..., got ...; remedy".
    """
    seed = secrets.randbits(64) if seed is None else seed
    found, left_out = [], 0
    for number, row in enumerate(rows):
        if problem := row_problem(row, ("prompt", "completions")):
            raise UserError(f"{source} row {number}: {problem}")
        shows = _shuffled(row, random.Random(f"{seed}/{number}"), f"{source} row {number}")
        if len(shows) < MIN_OUTPUTS:
            left_out += 1
        else:
            found.append((row, shows, None))
    if not found:
        raise UserError(
            f"{source}: expected a row with {MIN_OUTPUTS} different completions, got {left_out} rows, none with; draw "
            "more samples per prompt, at a higher temperature"
        )
    places = random.Random(f"{seed}/screening")
    for number, row in enumerate(screening):
        where = f"{screening_source} row {number}"
        if problem := row_problem(row, ("prompt", "completions", "ranks")):
            raise UserError(f"{where}: {problem}")
        shows = _shuffled(row, random.Random(f"{seed}/screening/{number}"), where)
        if len(set(row["ranks"])) < 2 or any(len({row["ranks"][i] for i in same}) > 1 for same in shows):
            raise UserError(
                f"{where}: field 'ranks': expected a known answer that orders different completions and ties "
                f"equal ones, got {shorten(row['ranks'])}; correct it or drop the row"
            )
        found.insert(places.randint(0, len(found)), (row, shows, tuple(row["ranks"])))
    tasks = [Task(str(i), row, shows, known) for i, (row, shows, known) in enumerate(found, start=1)]
    content = json.dumps([group, [[task.prompt, task.outputs] for task in tasks]])
    sheet = hashlib.sha256(content.encode()).hexdigest()[:12]
    return Key(sheet, {task.id: task for task in tasks}, seed, group), left_out


def _shuffled(row: Mapping[str, Any], rng: random.Random, where: str) -> tuple[tuple[int, ...], ...]:
    same: dict[str, list[int]] = {}
    for i, completion in enumerate(row["completions"]):
        same.setdefault(json.dumps(shown(completion)), []).append(i)
    if len(same) > MAX_OUTPUTS:
        raise UserError(
            f"{where}: field 'completions': expected at most {MAX_OUTPUTS} different completions, as a person can "
            f"order, got {len(same)}; leave some out"
        )
    shows = [tuple(places) for places in same.values()]
    rng.shuffle(shows)
    return tuple(shows)


def shown(value: Any) -> Shown:
    """A prompt or completion as a labeler sees it: the text, or [role, text] of each message.

    >>> shown([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    [['user', 'Hi']]
    """
    return value if isinstance(value, str) else [[message["role"], _said(message)] for message in value]


def as_text(value: Shown) -> str:
    """What `shown` gives as one text, for tools that show nothing else.

    >>> as_text([["user", "Hi"], ["assistant", "Hello"]])
    'user:\\nHi\\n\\nassistant:\\nHello'
    """
    return value if isinstance(value, str) else "\n\n".join(f"{role}:\n{said}" for role, said in value)


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    parts += message.get("tool_calls") or []
    return "\n".join(
        part["text"]
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        else json.dumps(part, ensure_ascii=False, indent=1)
        for part in parts
    )


def write_key(key: Key, path: str | Path, files: Iterable[Path] = ()) -> None:
    """One line about the sheet, then one per task; never over the key of another sheet, which may be out.

    Args:
        files: what will be written beside it; where there is no key, none of them may be there.

    Raises:
        FileExistsError: the file exists and is not the key of this very sheet, or one of `files` is of something else.
    """
    path = Path(path)
    in_the_way = [str(file) for file in files if file.exists() and not path.exists()]
    if in_the_way:
        raise FileExistsError(
            f"{in_the_way[0]} is in the way, and no key to it is beside it; choose another name, or move it"
        )
    if path.exists() and _sheet_of(path) != key.sheet:
        raise FileExistsError(
            f"{path} is in the way: it may be the key of a sheet whose answers are still to come; "
            "choose another name, or move it"
        )
    head = {"format": KEY_FORMAT, "version": 1, "sheet": key.sheet, "seed": key.seed, "group": key.group}
    tasks = key.tasks.values()
    lines = [{"task": t.id, "shows": t.shows, "expected": t.expected, "row": t.row} for t in tasks]
    write_jsonl(path, [head, *lines])


def write_with_key(key: Key, contents: Mapping[Path, str]) -> Path:
    """Write the files that labelers get, before them `NAME.key.jsonl`, named as the first; without it labor is lost."""
    path = next(iter(contents)).with_suffix(".key.jsonl")
    write_key(key, path, contents)
    for name, text in contents.items():
        write_whole(name, text)
    return path


def _sheet_of(path: Path) -> str | None:
    try:
        return read_key(path).sheet
    except ValueError:
        return None


def read_key(path: str | Path) -> Key:
    """The key that `write_key` wrote. A UserError names the line that is none of it."""
    lines = read_jsonl(path)
    head = lines[0] if lines else {}
    if head.get("format") != KEY_FORMAT or head.get("version") != 1:
        raise UserError(f"{path}: expected a key of a sheet (format {KEY_FORMAT!r}, version 1)")
    tasks = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            shows = tuple(tuple(places) for places in line["shows"])
            expected = None if line["expected"] is None else tuple(line["expected"])
            task = Task(line["task"], line["row"], shows, expected)
            k = len(task.row["completions"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} line {number}: not a task of a key ({error!r}); restore the file") from None
        if sorted(i for places in shows for i in places) != list(range(k)) or (
            expected is not None and ranks_problem(list(expected), k, "completions")
        ):
            raise UserError(f"{path} line {number}: does not fit its {k} completions; restore the file")
        tasks[task.id] = task
    return Key(head["sheet"], tasks, head["seed"], head["group"])
