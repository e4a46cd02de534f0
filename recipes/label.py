"""Rankings by people: a sheet for the browser out of samples, and ranked comparisons out of the answers.

    prefopt label export samples.jsonl --out sheet.html      # send sheet.html to labelers, keep sheet.key.jsonl
    prefopt label import answers*.jsonl --out rankings.jsonl

The sheet is one file that opens from disk, also on a phone and offline. Labelers send back what its download gives.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.evaluation.generate import read_jsonl, write_jsonl
from prefopt.labeling.answers import CHARACTERS_PER_SECOND, import_answers, read_answers
from prefopt.labeling.key import read_key
from prefopt.labeling.sheet import export_sheet
from prefopt.recipes.arguments import UserError, parse
from prefopt.recipes.data import check_fields, load_rows

logger = logging.getLogger(__name__)


@dataclass
class ExportArguments:
    """Which rows go into the sheet."""

    samples: str | None = field(
        default=None,
        metadata={"help": "Rows of `prompt` and `completions`, as `prefopt sample` writes them."},
    )
    out: str = field(default="sheet.html", metadata={"help": "The sheet; its key is written beside it."})
    instructions: str | None = field(
        default=None, metadata={"help": "Markdown file for labelers; default: prefopt's own instructions."}
    )
    screening: str | None = field(
        default=None, metadata={"help": "Ranked rows with a known answer, mixed in to screen labelers."}
    )
    group: str | None = field(
        default=None, metadata={"help": "Group of the labelers who get this sheet, e.g. train or heldout."}
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the shuffling; default: drawn, and kept in the key, so that nobody can guess it."
        },
    )


@dataclass
class ImportArguments:
    """Answers and what reads them."""

    answers: list[str] = field(default_factory=list, metadata={"help": "Files that labelers sent back."})
    key: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Keys of the sheets; default: every .key.jsonl beside the answers and in this folder."
        },
    )
    out: str = field(
        default="rankings.jsonl",
        metadata={"help": "Ranked comparisons; answers to screening tasks go into NAME.screening.jsonl."},
    )
    characters_per_second: float = field(
        default=CHARACTERS_PER_SECOND,
        metadata={"help": "Reading pace above which an answer is reported as too fast."},
    )


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        named = f", got {argv[0]!r}" if argv and argv[0] not in ("-h", "--help") else ""
        told = "\n".join(f"  {name:<12} {command.__doc__}" for name, command in COMMANDS.items())
        raise UserError(f"expected a command{named}: prefopt label <command> ...\n{told}")
    try:
        COMMANDS[argv[0]](argv[1:])
    except (ValueError, OSError) as error:
        raise UserError(error) from error


def export(argv: list[str]) -> None:
    """samples.jsonl --out sheet.html: one HTML file for labelers, and the key to its answers"""
    (args,) = parse((ExportArguments,), named(argv, "samples"), "prefopt label export")
    rows = _rows(args.samples, "samples")
    known = _rows(args.screening, "screening") if args.screening else []
    try:
        text = Path(args.instructions).read_text(encoding="utf-8-sig") if args.instructions else None
    except UnicodeDecodeError as error:
        raise UserError(f"instructions {args.instructions}: not UTF-8 text ({error})") from error
    written = export_sheet(
        rows,
        args.out,
        seed=args.seed,
        instructions=text,
        screening=known,
        group=args.group,
        source=str(args.samples),
        screening_source=str(args.screening),
    )
    if written.left_out:
        logger.warning(
            "left out %d of %d rows, whose completions are all one text: nothing to rank",
            written.left_out,
            len(rows),
        )
    print(
        f"sheet for labelers: {written.sheet} ({written.tasks} tasks, {written.screening} of them screening)"
    )
    print(f"key, to keep: {written.key}")


def import_(argv: list[str]) -> None:
    """answers*.jsonl --out rankings.jsonl: ranked comparisons from what labelers sent back, with a report"""
    (args,) = parse((ImportArguments,), named(argv, "answers"), "prefopt label import")
    if not args.answers:
        raise UserError("answers is required: the .jsonl files that labelers sent back")
    if args.characters_per_second <= 0:
        raise UserError(f"characters_per_second is {args.characters_per_second}; expected more than 0")
    folders = dict.fromkeys([*(Path(name).parent for name in args.answers), Path()])
    keys = args.key or sorted({path.resolve() for folder in folders for path in folder.glob("*.key.jsonl")})
    if not keys:
        raise UserError("no .key.jsonl beside the answers or in this folder; name it with --key")
    answers = [answer for name in args.answers for answer in read_answers(name)]
    imported = import_answers(
        answers, [read_key(path) for path in keys], characters_per_second=args.characters_per_second
    )
    out = Path(args.out)
    write_jsonl(out, imported.rows)
    print("\n".join(imported.report.lines()))
    print(f"ranked comparisons: {out} ({len(imported.rows)} rows)")
    if imported.screening:
        screening = out.with_suffix(".screening.jsonl")
        write_jsonl(screening, imported.screening)
        print(f"answers to screening tasks: {screening} ({len(imported.screening)} rows)")


def _rows(name: str | None, key: str) -> Sequence[Mapping[str, Any]]:
    """As written where that is JSON lines: a table would give every row the fields of all. Checked when blinded."""
    if name and name.endswith(".jsonl") and Path(name).is_file():
        return read_jsonl(name)
    return load_rows(name, key=key, check=check_fields("prompt"))


def named(argv: Sequence[str], name: str) -> list[str]:
    """The arguments before the first option as values of `--name`.

    >>> named(["a.jsonl", "b.jsonl", "--out", "c.jsonl"], "answers")
    ['--answers', 'a.jsonl', 'b.jsonl', '--out', 'c.jsonl']
    """
    first = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return [*([f"--{name}", *argv[:first]] if first else []), *argv[first:]]


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "export": export,
    "import": import_,
}


if __name__ == "__main__":
    main()
