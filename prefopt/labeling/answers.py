"""From the answers of labelers back to ranked rows: checked, unblinded and counted.

An answer file is what a sheet's "Download answers" gives: JSON lines, first one about the file, then one per task.

    {"format": "prefopt-answers", "version": 1, "sheet": "5f0c...", "labeler": "ann", "downloaded": "2026-...",
     "answers": 1}
    {"task": "1", "status": "done", "seconds": 41.5, "started": "2026-...", "finished": "2026-...",
     "saved": "2026-...", "ratings": [6, 2, 6], "flags": [[], ["hallucination"], []], "ranks": [1, 3, 1],
     "notes": "", "skipped": null}

Lists run over the outputs in the order shown. `ranks`: 1 = best, equal = tie, gaps allowed; null in a task that is not
done. `status` is "done", "skipped" (`skipped` is then {"reason": ..., "detail": ...}) or "started". `seconds` is the
time with the page in view and in use. Times are ISO 8601 in UTC. `answers` counts the lines that follow, so that a file
that was cut off on its way is noticed. Files may be joined: a line with `format` starts again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.inference.jsonl import iter_jsonl
from prefopt.labeling.flags import FLAGS
from prefopt.labeling.key import Key, Shown, Task
from prefopt.rankings.checks import dense_ranks, is_finite_number, shorten

ANSWERS_FORMAT = "prefopt-answers"
STATUSES = ("done", "skipped", "started")
REMEDY = "give the file that the sheet's download wrote"
MIN_RATING, MAX_RATING = 1, 7

# Brysbaert (2019, doi:10.1016/j.jml.2019.104047): adults read 238 words of English a minute in silence, about 24
# characters a second. Three times that is skimming at best; East Asian characters carry more, so the bound is mild.
CHARACTERS_PER_SECOND = 72.0

_OF_A_LINE = ("task", "ranks", "ratings", "flags", "seconds", "started", "finished", "saved", "skipped")
# Fields of a sample's row that speak of an earlier labeling.
_OF_EARLIER_LABELS = {"ranks", "ratings", "flags", "labeler", "group", "seconds", "notes", "sheet", "task"}


@dataclass(frozen=True)
class Answer:
    """What one labeler said of one task; lists run over the outputs in the order shown."""

    sheet: str
    task: str
    labeler: str
    status: str
    ranks: Sequence[int | None]
    ratings: Sequence[int | None] | None = None
    flags: Sequence[Sequence[str]] | None = None
    notes: str = ""
    seconds: float | None = None
    started: str | None = None
    finished: str | None = None
    saved: str | None = None
    skipped: Mapping[str, str] | None = None
    source: str = "answers"


@dataclass
class ImportReport:
    """What came of the answers: `answers` = done + skipped + unfinished + repeated + revised."""

    answers: int = 0
    done: int = 0
    skipped: int = 0
    unfinished: int = 0
    repeated: int = 0  # the same answer again, e.g. downloaded twice
    revised: int = 0  # an answer of the same labeler to the same task; the newest finished one counts
    rows: int = 0
    screening: int = 0
    all_tied: int = 0
    too_fast: int = 0
    contradictory: int = 0  # answers with a pair ranked against its ratings
    pairs: int = 0  # pairs that were ranked strictly and have ratings
    contradictory_pairs: int = 0
    labelers: dict[str, int] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)  # tasks of a sheet that a labeler of it has not done
    skip_reasons: dict[str, int] = field(default_factory=dict)
    skipped_by: dict[str, int] = field(default_factory=dict)
    similar_names: list[str] = field(default_factory=list)  # of labelers, that differ in case or spaces alone
    revised_answers: list[str] = field(default_factory=list)
    too_fast_answers: list[str] = field(default_factory=list)
    contradictory_answers: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in words, one finding a line."""
        per_labeler = ", ".join(f"{name} {n}" for name, n in sorted(self.labelers.items()))
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(self.skip_reasons.items()))
        revised, too_fast, contradictory = map(
            _some, (self.revised_answers, self.too_fast_answers, self.contradictory_answers)
        )
        against = f"{self.contradictory_pairs} of {self.pairs} pairs"
        findings = [
            (self.skipped, f"skipped ({reasons})"),
            (self.unfinished, "unfinished: no row"),
            (self.repeated, "the same again: counted once"),
            (self.all_tied, "with all outputs tied: kept, but no pair to learn from"),
            (
                self.revised,
                f"more to a task that its labeler answered again, the newest finished one counts: {revised}",
            ),
            (self.too_fast, f"faster than one can read, kept: {too_fast}"),
            (self.contradictory, f"rank against their own ratings ({against}), kept: {contradictory}"),
            *((n, f"tasks not done: {name}") for name, n in sorted(self.unanswered.items())),
        ]
        done = f"{self.done} done, of them {self.rows} rows to train on and {self.screening} to screening tasks"
        lines = [f"{self.answers} answers: {done} ({per_labeler or 'no labeler'})"]
        lines += [f"{n} {words}" for n, words in findings if n]
        if self.similar_names:
            lines.append(f"counted as different labelers, one person? {', '.join(self.similar_names)}")
        return lines


@dataclass(frozen=True)
class Imported:
    """Ranked rows to train on, the rows of screening tasks (with `expected_ranks`), and what was found on the way."""

    rows: list[dict[str, Any]]
    screening: list[dict[str, Any]]
    report: ImportReport


def read_answers(path: str | Path) -> list[Answer]:
    """The answers in a file that a sheet gave; what they say of tasks is checked by `import_answers`.

    Raises:
        UserError: "FILE line 3: field 'ranks': expected ..., got ...; remedy".
    """
    parts: list[tuple[dict[str, Any], list[Answer]]] = []
    for number, line in enumerate(iter_jsonl(path), start=1):
        where = f"{path} line {number}"
        if "format" in line:
            if line["format"] != ANSWERS_FORMAT or line.get("version") != 1:
                got = f"{shorten(line['format'])}, version {line.get('version')!r}"
                raise UserError(f"{where}: expected format {ANSWERS_FORMAT!r}, version 1, got {got}; {REMEDY}")
            for name in ("sheet", "labeler"):
                if not isinstance(line.get(name), str) or not line[name].strip():
                    raise UserError(f"{where}: field {name!r}: expected a name, got {shorten(line.get(name))}")
            parts.append((line, []))
            continue
        if not parts:
            raise UserError(f"{where}: expected a first line with 'format', 'sheet' and 'labeler'; {REMEDY}, whole")
        if not isinstance(line.get("task"), str):
            raise UserError(f"{where}: field 'task': expected its number, got {shorten(line.get('task'))}")
        head, found = parts[-1]
        said = {name: line.get(name) for name in _OF_A_LINE}
        said |= {"status": line.get("status", ""), "notes": line.get("notes") or ""}
        found.append(Answer(sheet=head["sheet"], labeler=head["labeler"].strip(), source=where, **said))
    if not parts:
        raise UserError(f"{path}: no answers; {REMEDY}")
    for head, found in parts:
        if head.get("answers") not in (None, len(found)):
            raise UserError(
                f"{path}: expected {shorten(head['answers'])} answers of {head['labeler'].strip()}, as its first line "
                f"says, got {len(found)}; the file was cut off or edited: ask for it again"
            )
    return [answer for _, found in parts for answer in found]


def import_answers(
    answers: Iterable[Answer], keys: Iterable[Key], *, characters_per_second: float = CHARACTERS_PER_SECOND
) -> Imported:
    """Ranked rows from answers: one row per labeler and task, the completions in the order of the samples again.

    A row has every field of its sample, and `ranks`, `labeler`, `group`, `ratings`, `flags` (one {name: bool} per
    completion), `seconds`, `notes`, `sheet` and `task`. Only answers that are not done give no row, and of several by one
    labeler to one task all but the newest, a finished one before one that was begun again; the report counts these and
    what looks doubtful, such as an answer in less time than its texts take at `characters_per_second`.

    Raises:
        UserError: an answer to a sheet without a key or that does not fit its task, naming the line.
    """
    by_sheet = {key.sheet: key for key in keys}
    report = ImportReport()
    newest: dict[tuple[str, str, str], Answer] = {}
    for answer in answers:
        if answer.sheet not in by_sheet:
            raise UserError(
                f"{answer.source}: no key for sheet {answer.sheet!r}, have {', '.join(sorted(by_sheet)) or 'none'}; "
                "give the .key.jsonl file that was written beside that sheet"
            )
        task = by_sheet[answer.sheet].tasks.get(answer.task)
        if task is None:
            raise UserError(f"{answer.source}: field 'task': sheet {answer.sheet} has no task {answer.task!r}")
        if problem := _problem_of(answer, len(task.shows)):
            raise UserError(f"{answer.source}: {problem}")
        report.answers += 1
        name = (answer.labeler, answer.sheet, answer.task)
        if name in newest:
            if _content(newest[name]) == _content(answer):
                report.repeated += 1
                continue
            report.revised_answers.append(f"{answer.labeler} task {answer.task}")
            if _age(answer) < _age(newest[name]):
                continue
        newest[name] = answer
    done, skipped, started = ([a for a in newest.values() if a.status == status] for status in STATUSES)
    rows, screening = [], []
    for answer in done:
        key = by_sheet[answer.sheet]
        task = key.tasks[answer.task]
        _inspect(answer, task, characters_per_second, report)
        (screening if task.is_screening else rows).append(_row(answer, task, key.group))
    report.done, report.skipped, report.unfinished = len(done), len(skipped), len(started)
    report.rows, report.screening, report.revised = len(rows), len(screening), len(report.revised_answers)
    report.too_fast, report.contradictory = len(report.too_fast_answers), len(report.contradictory_answers)
    report.labelers = dict(Counter(a.labeler for a in done))
    report.skipped_by = dict(Counter(a.labeler for a in skipped))
    report.skip_reasons = dict(Counter((a.skipped or {}).get("reason") or "no reason" for a in skipped))
    finished = Counter((a.labeler, a.sheet) for a in [*done, *skipped])
    for labeler, sheet in sorted({(a.labeler, a.sheet) for a in newest.values()}):
        if missing := len(by_sheet[sheet].tasks) - finished[labeler, sheet]:
            report.unanswered[f"{labeler} (sheet {sheet})"] = missing
    names: dict[str, list[str]] = {}
    for labeler in sorted({a.labeler for a in newest.values()}):
        names.setdefault("".join(labeler.casefold().split()), []).append(labeler)
    report.similar_names = [" / ".join(same) for same in names.values() if len(same) > 1]
    return Imported(rows, screening, report)


def _row(answer: Answer, task: Task, group: str | None) -> dict[str, Any]:
    flags = None
    if answer.flags is not None:
        flags = [{flag: flag in said for flag in FLAGS} for said in task.per_completion(answer.flags)]
    row = {name: value for name, value in task.row.items() if name not in _OF_EARLIER_LABELS} | {
        "ranks": dense_ranks(task.per_completion(answer.ranks)),
        "labeler": answer.labeler,
        "group": group,
        "ratings": None if answer.ratings is None else task.per_completion(answer.ratings),
        "flags": flags,
        **{name: getattr(answer, name) for name in ("seconds", "notes", "sheet", "task")},
    }
    return row | {"expected_ranks": list(task.expected)} if task.is_screening else row


def _inspect(answer: Answer, task: Task, characters_per_second: float, report: ImportReport) -> None:
    name = f"{answer.labeler} task {answer.task}"
    report.all_tied += len(set(answer.ranks)) == 1
    if answer.seconds is not None and answer.seconds < characters(task) / characters_per_second:
        report.too_fast_answers.append(name)
    if answer.ratings is not None:
        both = combinations(zip(answer.ranks, answer.ratings, strict=True), 2)
        strict = [(a, b) for a, b in both if a[0] != b[0]]
        # The one with the larger (worse) rank has the higher rating.
        against = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in strict)
        report.pairs += len(strict)
        report.contradictory_pairs += against
        if against:
            report.contradictory_answers.append(name)


def characters(task: Task) -> int:
    """What a labeler has to read: the characters of the prompt and of every output."""

    def length(text: Shown) -> int:
        return len(text) if isinstance(text, str) else sum(len(said) for _, said in text)

    return length(task.prompt) + sum(map(length, task.outputs))


def _problem_of(answer: Answer, k: int) -> str | None:
    def wrong(name: str, expected: str) -> str:
        return f"field {name!r}: expected {expected}, got {shorten(getattr(answer, name))}"

    def is_whole(value: Any, least: int, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    if answer.status not in STATUSES:
        return wrong("status", f"one of {', '.join(STATUSES)}")
    is_done = answer.status == "done"
    for name, least, most in (("ranks", 1, k), ("ratings", MIN_RATING, MAX_RATING)):
        values = getattr(answer, name)
        if name == "ratings" and values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != k:
            return wrong(name, f"{k}, one for each output shown")
        if not all(is_whole(v, least, most) or (v is None and not is_done) for v in values):
            return wrong(name, f"whole numbers from {least} to {most}")
    if answer.flags is not None:
        if not isinstance(answer.flags, list | tuple) or len(answer.flags) != k:
            return wrong("flags", f"{k} lists, one for each output shown")
        if not all(isinstance(one, list | tuple) and all(flag in FLAGS for flag in one) for one in answer.flags):
            return wrong("flags", f"lists of names among {', '.join(FLAGS)}")
    if not isinstance(answer.notes, str):
        return wrong("notes", "a text")
    if answer.skipped is not None and not isinstance(answer.skipped, Mapping):
        return wrong("skipped", "an object with 'reason'")
    if answer.seconds is not None and not (is_finite_number(answer.seconds) and answer.seconds >= 0):
        return wrong("seconds", "a number from 0 on")
    for name in ("started", "finished", "saved"):
        if not isinstance(getattr(answer, name), str | None):
            return wrong(name, "a time as text")
    return None


def _content(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in asdict(answer).items() if name not in ("source", "saved")}


def _age(answer: Answer) -> tuple[bool, str]:
    """A finished answer is not lost to a task that was only opened again, e.g. on another device."""
    return answer.status != "started", answer.saved or answer.finished or answer.started or ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
