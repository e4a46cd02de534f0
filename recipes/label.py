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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.progress import track

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_json, read_jsonl, write_json, write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.labeling.agreement import agreement
from prefopt.labeling.answers import CHARACTERS_PER_SECOND, import_answers, read_answers
from prefopt.labeling.key import blind, read_key, write_with_key
from prefopt.labeling.label_studio import labeling_config, read_label_studio, to_label_studio
from prefopt.labeling.next_tasks import choose_next
from prefopt.labeling.sheet import default_instructions, render_instructions, sheet_page
from prefopt.models.checkpoints import load_classifier
from prefopt.rankings.checks import row_problem
from prefopt.rankings.formats.tables import without_choice
from prefopt.recipes.common.arguments import dispatch, setting
from prefopt.recipes.common.rows import check_fields, load_rows
from prefopt.recipes.common.sources import check_output, rows_of_jsonl

logger = logging.getLogger(__name__)

Format = Literal["sheet", "label-studio"]
READERS = {"sheet": read_answers, "label-studio": read_label_studio}
# Between two steps of the progress bar.
ROWS_AT_ONCE = 200
# What is written, under which name, and who needs its suffix.
OUTPUTS = {
    "sheet": ("sheet for labelers", "sheet.html", "browsers open"),
    "label-studio": ("for Label Studio", "label-studio.json", "Label Studio imports"),
}


@dataclass
class ExportArguments:
    """Which rows go into the sheet."""

    LEAST: ClassVar[dict[str, float]] = {"seed": 0}

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

    LEAST: ClassVar[dict[str, float]] = {"batch_size": 1}

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
    """samples.jsonl --out sheet.html: one HTML file for labelers, and the key to its answers."""
    rows = _rows(args.samples, "samples")
    known = _rows(args.screening, "screening") if args.screening else []
    try:
        text = Path(args.instructions).read_text(encoding="utf-8-sig") if args.instructions else None
    except UnicodeDecodeError as error:
        raise UserError(f"instructions {args.instructions}: not UTF-8 text ({error})") from error
    text = default_instructions() if text is None else text
    what, usual, use = OUTPUTS[args.format]
    out = Path(args.out or usual)
    if out.suffix != Path(usual).suffix:
        raise UserError(f"{out}: expected a name ending in {Path(usual).suffix}, as {use} it by its name")
    options = {"seed": args.seed, "group": args.group, "screening": known, "screening_source": str(args.screening)}
    key, left_out = blind(rows, source=str(args.samples), **options)
    if args.format == "sheet":
        contents = {out: sheet_page(key, text)}
    else:
        contents = {
            out: json.dumps(to_label_studio(key)),
            out.with_suffix(".xml"): labeling_config(key),
            out.with_suffix(".instructions.html"): render_instructions(text),
        }
    key_path = write_with_key(key, contents)
    if left_out:
        logger.warning(
            "left out %d of %d rows, whose completions are all one text: nothing to rank", left_out, len(rows)
        )
    screening = sum(task.is_screening for task in key.tasks.values())
    print(f"{what}: {', '.join(map(str, contents))} ({len(key.tasks)} tasks, {screening} of them screening)")
    print(f"key, to keep: {key_path}")


def import_rankings(args: ImportArguments) -> None:
    """answers*.jsonl --out rankings.jsonl: ranked comparisons from what labelers sent back, with a report."""
    if not args.answers:
        raise UserError("answers is required: the files that labelers sent back")
    if args.characters_per_second <= 0:
        raise UserError(f"characters_per_second is {args.characters_per_second}; expected more than 0")
    folders = dict.fromkeys([*(Path(name).parent for name in args.answers), Path()])
    keys = args.key or sorted({path.resolve() for folder in folders for path in folder.glob("*.key.jsonl")})
    if not keys:
        raise UserError("no .key.jsonl next to the answers or in this folder; name it with --key")
    answers = (answer for name in args.answers for answer in READERS[args.format](name))
    imported = import_answers(answers, map(read_key, keys), characters_per_second=args.characters_per_second)
    out = Path(args.out)
    check_output(out, [*args.answers, *keys])
    screening = out.with_suffix(".screening.jsonl")
    if screening.exists() and not imported.screening and not args.overwrite:
        raise UserError(
            f"{screening} is of an earlier import, and this one has no answers to screening tasks; name another file, or "
            "replace it with --overwrite"
        )
    write_jsonl(out, imported.rows, replace=args.overwrite)
    write_json(out.with_suffix(".report.json"), asdict(imported.report), replace=args.overwrite)
    print("\n".join(imported.report.lines()))
    print(f"ranked comparisons: {out} ({len(imported.rows)} rows)")
    if imported.screening:
        write_jsonl(screening, imported.screening, replace=args.overwrite)
        print(f"answers to screening tasks: {screening} ({len(imported.screening)} rows)")
    else:
        # One of an earlier import into the same file would be taken for this one's.
        screening.unlink(missing_ok=True)


def show_agreement(args: AgreementArguments) -> None:
    """rankings.jsonl: how far labelers agree with each other, and each with known answers."""
    if not args.rankings:
        raise UserError("rankings is required: ranked comparisons with `labeler`")
    files = [Path(name) for name in args.rankings]
    if args.out:
        check_output(Path(args.out), [*files, *args.screening])
    usual = [path.with_suffix(".screening.jsonl") for path in files]
    screening = [Path(name) for name in args.screening] or [path for path in usual if path.is_file()]
    skipped: Counter[str] = Counter()
    for report in (path.with_suffix(".report.json") for path in files):
        skipped.update(_skips(report) if report.is_file() else {})
    rows = [row for path in files for row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{' + '.join(map(str, files))}: no rows to compare")
    known = [row for path in screening for row in read_jsonl(path)]
    sources = {"source": " + ".join(map(str, files)), "screening_source": " + ".join(map(str, screening))}
    result = agreement(rows, screening=known, skipped=skipped, **sources)
    print("\n".join(result.lines()))
    if args.out:
        write_json(args.out, asdict(result), replace=args.overwrite)


def choose_tasks(args: NextArguments) -> None:
    """samples.jsonl --reward_model rm: which prompts and outputs to show next, by the reward model's doubt."""
    if not args.reward_model:
        raise UserError("reward_model is required: what `prefopt reward` saved, once or several times")
    if args.by == "disagreement" and len(args.reward_model) < 2:
        raise UserError("by is 'disagreement': give two reward models or more, or choose 'margin'")
    rows = list(_rows(args.samples, "samples"))
    for number, row in enumerate(rows):
        if problem := row_problem(row, ("prompt", "completions")):
            raise UserError(f"{args.samples} row {number}: {problem}")
    labeled = {
        json.dumps(row.get("prompt"), sort_keys=True, default=str) for name in args.labeled for row in read_jsonl(name)
    }
    numbers = [
        i for i, row in enumerate(rows) if json.dumps(row["prompt"], sort_keys=True, default=str) not in labeled
    ]
    left = [rows[number] for number in numbers]
    options = {"n": args.n, "k": args.k, "random_share": args.random_share, "by": args.by, "seed": args.seed}
    # Without rows it checks the arguments alone, before models are loaded.
    choose_next([], [], **options)
    check_output(Path(args.out), [args.samples, *args.labeled])
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out} is there already; name another file, or replace it with --overwrite")
    if not left:
        raise UserError(f"{args.samples}: all {len(rows)} prompts are labeled already, or there are none")
    scores = []
    for name in args.reward_model:
        model, tokenizer = load_classifier(name)
        of: list[list[float]] = []
        for start in track(range(0, len(left), ROWS_AT_ONCE), f"scores of {name}"):
            part = slice(start, start + ROWS_AT_ONCE)
            try:
                of += score_rows(model, tokenizer, left[part], args.batch_size, numbers[part])
            except UserError as error:
                raise UserError(f"{args.samples}, {name}, {error}") from error
        scores.append(of)
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
        return dict(read_json(report, "skipped_by")["skipped_by"])
    except (ValueError, TypeError):
        raise UserError(f"{report}: not the report of `prefopt label import`; import again, or move it") from None


def _rows(name: str | None, key: str) -> Sequence[Mapping[str, Any]]:
    """As written where that is JSON lines: a table would give every row the fields of all. Checked when blinded."""
    if name and name.endswith(".jsonl") and Path(name).is_file():
        return list(map(without_choice, rows_of_jsonl(name, "train")))
    return list(map(without_choice, load_rows(name, key=key, check=check_fields("prompt"))))


COMMANDS = {"export": export, "import": import_rankings, "agreement": show_agreement, "next": choose_tasks}
