"""Rankings by people: a sheet for the browser out of samples, and ranked comparisons out of the answers.

    prefopt label export samples.jsonl --out sheet.html      # send sheet.html to labelers, keep sheet.key.jsonl
    prefopt label import answers*.jsonl --out rankings.jsonl
    prefopt label agreement rankings.jsonl                   # how far labelers agree, and each against the others
    prefopt label next samples.jsonl --reward_model rm --labeled rankings.jsonl --out next.jsonl

The sheet is one file that opens from disk, also on a phone and offline. Labelers send back what its download gives.
`--format label-studio` writes for Label Studio instead, and reads what it gives back.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import track

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_jsonl, write_jsonl, write_whole
from prefopt.inference.scoring import score_rows
from prefopt.labeling.agreement import agreement
from prefopt.labeling.answers import CHARACTERS_PER_SECOND, import_answers, read_answers
from prefopt.labeling.key import Key, blind, read_key, write_key
from prefopt.labeling.label_studio import labeling_config, read_label_studio, to_label_studio
from prefopt.labeling.next_tasks import choose_next
from prefopt.labeling.sheet import default_instructions, export_sheet, render_instructions
from prefopt.models.checkpoints import load_classifier
from prefopt.rankings.checks import row_problem
from prefopt.recipes.common.arguments import Command, dispatch, setting
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.rows import check_fields, load_rows
from prefopt.recipes.common.sources import keep_inputs

logger = logging.getLogger(__name__)

Format = Literal["sheet", "label-studio"]
READERS = {"sheet": read_answers, "label-studio": read_label_studio}
# Between two steps of the progress bar.
ROWS_AT_ONCE = 200
OUTPUTS = {"sheet": "sheet.html", "label-studio": "label-studio.json"}


@dataclass
class ExportArguments:
    """Which rows go into the sheet."""

    samples: str | None = setting(None, "Rows of `prompt` and `completions`, as `prefopt sample` writes them.")
    format: Format = setting("sheet", "What to write: our sheet, or tasks for Label Studio.")
    out: str | None = setting(
        None, "The sheet (sheet.html) or tasks (label-studio.json); its key is written next to it."
    )
    instructions: str | None = setting(None, "Markdown file for labelers; default: prefopt's own instructions.")
    screening: str | None = setting(None, "Ranked rows with a known answer, mixed in to screen labelers.")
    group: str | None = setting(None, "Group of the labelers who get this sheet, e.g. train or heldout.")
    seed: int | None = setting(
        None, "Seed of the shuffling; default: drawn, and kept in the key, so that nobody can guess it."
    )


@dataclass
class ImportArguments:
    """Answers and what reads them."""

    answers: list[str] = setting(list, "Files that labelers sent back.")
    format: Format = setting("sheet", "Where the answers come from; as they were exported.")
    key: list[str] = setting(
        list, "Keys of the sheets; default: every .key.jsonl next to the answers and in this folder."
    )
    out: str = setting(
        "rankings.jsonl",
        "Ranked comparisons; answers to screening tasks go into NAME.screening.jsonl, counts into NAME.report.json.",
    )
    characters_per_second: float = setting(
        CHARACTERS_PER_SECOND, "Reading pace above which an answer is reported as too fast."
    )
    overwrite: bool = setting(False, "Replace files that are there and hold something else.")


@dataclass
class AgreementArguments:
    """Whose rankings to compare."""

    rankings: list[str] = setting(list, "Ranked comparisons with `labeler`, of `prefopt label import`.")
    screening: list[str] = setting(
        list, "Answers to screening tasks; default: NAME.screening.jsonl next to the rankings."
    )
    out: str | None = setting(None, "JSON file for all numbers.")
    overwrite: bool = setting(False, "Replace files that are there and hold something else.")


@dataclass
class NextArguments:
    """What to choose from, and by which reward model."""

    samples: str | None = setting(None, "Rows of `prompt` and `completions`, as `prefopt sample` writes them.")
    reward_model: list[str] = setting(list, "Reward models, e.g. checkpoints of one or of several seeds.")
    labeled: list[str] = setting(list, "Rankings whose prompts are not to be shown again.")
    out: str = setting("next.jsonl", "Rows for `prefopt label export`.")
    overwrite: bool = setting(False, "Replace files that are there and hold something else.")
    n: int = setting(100, "Prompts to choose.")
    k: int = setting(4, "Most outputs per prompt (paper: 4 to 9).")
    by: Literal["margin", "disagreement"] = setting(
        "margin", "Margins near 0, or (two reward models or more) disagreement between them."
    )
    random_share: float = setting(0.1, "Share of the prompts drawn at random, for an unbiased estimate.")
    batch_size: int = setting(64, "Completions scored at once.")
    seed: int = setting(42, "Seed of what is drawn at random.")


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    dispatch("prefopt label", COMMANDS, argv, "...")


def export(args: ExportArguments) -> None:
    """Write the sheet, or the tasks of another tool, and the key to its answers."""
    rows = _rows(args.samples, "samples")
    known = _rows(args.screening, "screening") if args.screening else []
    try:
        text = Path(args.instructions).read_text(encoding="utf-8-sig") if args.instructions else None
    except UnicodeDecodeError as error:
        raise UserError(f"instructions {args.instructions}: not UTF-8 text ({error})") from error
    named_rows = {"source": str(args.samples), "screening_source": str(args.screening)}
    out = Path(args.out or OUTPUTS[args.format])
    options = {"seed": args.seed, "screening": known, "group": args.group, **named_rows}
    if args.format == "sheet":
        written = export_sheet(rows, out, instructions=text, **options)
        left_out, tasks, screening = written.left_out, written.tasks, written.screening
        files, key_path = [written.sheet], written.key
    else:
        key, left_out = blind(rows, **options)
        tasks, screening = len(key.tasks), sum(task.is_screening for task in key.tasks.values())
        files, key_path = _export_to_label_studio(key, out, text or default_instructions())
    if left_out:
        logger.warning(
            "left out %d of %d rows, whose completions are all one text: nothing to rank", left_out, len(rows)
        )
    what = {"sheet": "sheet for labelers", "label-studio": "for Label Studio"}
    print(f"{what[args.format]}: {', '.join(map(str, files))} ({tasks} tasks, {screening} of them screening)")
    print(f"key, to keep: {key_path}")


def _export_to_label_studio(key: Key, out: Path, instructions: str) -> tuple[list[Path], Path]:
    """The key first, as for a sheet: tasks without it would be labor lost."""
    if out.suffix != ".json":
        raise UserError(f"{out}: expected a name ending in .json, as Label Studio imports it by its name")
    key_path = out.with_suffix(".key.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        out: json.dumps(to_label_studio(key)),
        out.with_suffix(".xml"): labeling_config(key),
        out.with_suffix(".instructions.html"): render_instructions(instructions),
    }
    write_key(key, key_path, contents)
    for path, content in contents.items():
        write_whole(path, content)
    return list(contents), key_path


def import_rankings(args: ImportArguments) -> None:
    """Write the rankings that labelers sent back, and a report of them."""
    if not args.answers:
        raise UserError("answers is required: the files that labelers sent back")
    if args.characters_per_second <= 0:
        raise UserError(f"characters_per_second is {args.characters_per_second}; expected more than 0")
    folders = dict.fromkeys([*(Path(name).parent for name in args.answers), Path()])
    keys = args.key or sorted({path.resolve() for folder in folders for path in folder.glob("*.key.jsonl")})
    if not keys:
        raise UserError("no .key.jsonl next to the answers or in this folder; name it with --key")
    answers = [answer for name in args.answers for answer in READERS[args.format](name)]
    imported = import_answers(
        answers, [read_key(path) for path in keys], characters_per_second=args.characters_per_second
    )
    out = Path(args.out)
    keep_inputs(out, [*args.answers, *keys])
    screening = out.with_suffix(".screening.jsonl")
    if screening.exists() and not imported.screening and not args.overwrite:
        raise UserError(
            f"{screening} is of an earlier import, and this one has no answers to screening tasks; name another file, or "
            "replace it with --overwrite"
        )
    write_jsonl(out, imported.rows, replace=args.overwrite)
    report = json.dumps(imported.report.to_dict(), indent=1) + "\n"
    write_whole(out.with_suffix(".report.json"), report, replace=args.overwrite)
    print("\n".join(imported.report.lines()))
    print(f"ranked comparisons: {out} ({len(imported.rows)} rows)")
    if imported.screening:
        write_jsonl(screening, imported.screening, replace=args.overwrite)
        print(f"answers to screening tasks: {screening} ({len(imported.screening)} rows)")
    else:
        # One of an earlier import into the same file would be taken for this one's.
        screening.unlink(missing_ok=True)


def show_agreement(args: AgreementArguments) -> None:
    """Print how far labelers agree with each other and with known answers."""
    if not args.rankings:
        raise UserError("rankings is required: ranked comparisons with `labeler`")
    files = [Path(name) for name in args.rankings]
    if args.out:
        keep_inputs(Path(args.out), [*files, *args.screening])
    usual = [path.with_suffix(".screening.jsonl") for path in files]
    screening = [Path(name) for name in args.screening] or [path for path in usual if path.is_file()]
    skipped: dict[str, int] = {}
    for path in files:
        report = path.with_suffix(".report.json")
        if report.is_file():
            for name, n in _skips(report).items():
                skipped[name] = skipped.get(name, 0) + n
    rows = [row for path in files for row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{' + '.join(map(str, files))}: no rows to compare")
    result = agreement(
        rows,
        screening=[row for path in screening for row in read_jsonl(path)],
        skipped=skipped,
        source=" + ".join(map(str, files)),
        screening_source=" + ".join(map(str, screening)),
    )
    print("\n".join(result.lines()))
    if args.out:
        text = json.dumps(_finite(result.to_dict()), indent=1) + "\n"
        write_whole(args.out, text, replace=args.overwrite)


def choose_tasks(args: NextArguments) -> None:
    """Write the prompts and outputs of which the reward models are least sure."""
    if not args.reward_model:
        raise UserError("reward_model is required: what `prefopt reward` saved, once or several times")
    if args.by == "disagreement" and len(args.reward_model) < 2:
        raise UserError("by is 'disagreement': give two reward models or more, or choose 'margin'")
    if args.batch_size < 1:
        raise UserError(f"batch_size is {args.batch_size}; expected at least 1")
    rows = list(_rows(args.samples, "samples"))
    for number, row in enumerate(rows):
        if problem := row_problem(row, ("prompt", "completions")):
            raise UserError(f"{args.samples} row {number}: {problem}")
    labeled = {json.dumps(row.get("prompt"), sort_keys=True) for name in args.labeled for row in read_jsonl(name)}
    left = [row for row in rows if json.dumps(row["prompt"], sort_keys=True) not in labeled]
    options = {"n": args.n, "k": args.k, "random_share": args.random_share, "by": args.by, "seed": args.seed}
    # Without rows it checks the arguments alone, before models are loaded.
    choose_next([], [], **options)
    keep_inputs(Path(args.out), [args.samples, *args.labeled])
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out} is there already; name another file, or replace it with --overwrite")
    if not left:
        raise UserError(f"{args.samples}: all {len(rows)} prompts are labeled already, or there are none")
    scores = []
    for name in args.reward_model:
        model, tokenizer = load_classifier(name)
        parts = [left[start : start + ROWS_AT_ONCE] for start in range(0, len(left), ROWS_AT_ONCE)]
        shown = track(parts, f"scores of {name}")
        scores.append([score for part in shown for score in score_rows(model, tokenizer, part, args.batch_size)])
    chosen = choose_next(left, list(zip(*scores, strict=True)), **options, source=str(args.samples))
    if not chosen:
        raise UserError(f"{args.samples}: no prompt with two different outputs is left to label")
    write_jsonl(args.out, chosen)
    at_random = sum(row["chosen"] == "random" for row in chosen)
    print(
        f"{len(rows)} prompts, {len(rows) - len(left)} of them labeled already; chose {len(chosen)}: "
        f"{len(chosen) - at_random} by {args.by}, {at_random} at random"
    )
    print(f"to export: {args.out}")


def _skips(report: Path) -> dict[str, int]:
    """How many tasks each labeler skipped, as `prefopt label import` reported it."""
    try:
        return dict(json.loads(report.read_text(encoding="utf-8"))["skipped_by"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{report}: not the report of `prefopt label import`; import again, or move it") from None


def _finite(value: Any) -> Any:
    """Numbers that JSON does not have (an interval of one prompt) as null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(name: str | None, key: str) -> Sequence[Mapping[str, Any]]:
    """As written where that is JSON lines: a table would give every row the fields of all. Checked when blinded."""
    if name and name.endswith(".jsonl") and Path(name).is_file():
        return read_jsonl(name)
    return load_rows(name, key=key, check=check_fields("prompt"))


COMMANDS = {
    "export": Command(
        export,
        (ExportArguments,),
        "samples",
        "samples.jsonl --out sheet.html: one HTML file for labelers, and the key to its answers",
    ),
    "import": Command(
        import_rankings,
        (ImportArguments,),
        "answers",
        "answers*.jsonl --out rankings.jsonl: ranked comparisons from what labelers sent back, with a report",
    ),
    "agreement": Command(
        show_agreement,
        (AgreementArguments,),
        "rankings",
        "rankings.jsonl: how far labelers agree with each other, and each with known answers",
    ),
    "next": Command(
        choose_tasks,
        (NextArguments,),
        "samples",
        "samples.jsonl --reward_model rm: which prompts and outputs to show next, by the reward model's doubt",
    ),
}


if __name__ == "__main__":
    run_command(main, "label")
