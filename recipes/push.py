"""Publish a trained model on the Hub, with a model card; run again, it resumes where it failed.

    prefopt push rm me/my-reward-model
    prefopt push policy me/my-policy --merge true --private true
    prefopt push policy me/my-policy --results evaluation/results.json
    prefopt push policy me/my-policy --dry_run look        # writes what would be published into the folder `look`

Needs a token that may write: `hf auth login`, or HF_TOKEN. A LoRA adapter is published as an adapter, or with `merge`
as a whole model; of a PPO-ptx or DPO run the policy alone, unless `roles` is set.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefopt.errors import UserError
from prefopt.hub.cards import is_handwritten, read_facts, write_card
from prefopt.hub.push import HubError, files_to_publish, push_command, push_folder, save_merged, write_published
from prefopt.inference.jsonl import read_json
from prefopt.recipes.common.arguments import parse, setting

# Measures of results.json that a card shows, with what follows a dot, and what the card calls them.
SHOWN = {
    "winrate": "win rate",
    "winrate_judge": "win rate, judge",
    "winrate_length_controlled": "win rate at equal length",
    "rm.accuracy": "pairwise accuracy,",
    "gold_reward": "gold reward",
    "kl_to_sft": "KL to the SFT model (nats)",
    "pretraining_bits_per_byte": "bits per byte of held-out text",
    "heldout_task_accuracy": "accuracy on held-out tasks",
}
EVALUATION = "prefopt eval"


@dataclass
class PushArguments:
    """What to publish where."""

    folder: str | None = setting(None, "A trained model: the output_dir of a step.")
    repo_id: str | None = setting(None, "OWNER/NAME on the Hub, or a NAME of your own.")
    merge: bool = setting(False, "Publish an adapter merged into its base, as a whole model.")
    private: bool = setting(False, "Make the repository private; stops if it is there and public.")
    revision: str | None = setting(None, "Branch to commit to; default: main.")
    roles: bool = setting(
        False, "Also publish what PPO-ptx and DPO keep next to the policy: value function, reference, ..."
    )
    results: str | None = setting(None, "results.json of `prefopt eval`, whose numbers go into the card.")
    dry_run: str | None = setting(
        None, "New folder: write there what would be published, card included; nothing is sent."
    )
    results_name: str | None = setting(None, "The model's name in it; default: the folder's name.")


def main(argv: list[str] | None = None) -> None:
    """Publish one folder."""
    (args,) = parse((PushArguments,), argv, "prefopt push", positional=("folder", "repo_id"))
    if not args.folder or not args.repo_id:
        raise UserError("give a folder and a repository: prefopt push FOLDER OWNER/NAME")
    folder = Path(args.folder)
    retry = push_command(**vars(args))
    try:
        files_to_publish(folder)
        rows = results_of(args.results, args.results_name or folder.resolve().name) if args.results else []
        if rows and is_handwritten(folder):
            raise UserError(
                f"{folder / 'README.md'} was edited by hand, so no results are added to it: leave --results away, or move "
                "the file aside to have it written again"
            )
        if rows and not args.dry_run:
            add_results(folder, rows)
        with ExitStack() as stack:
            source = folder
            if args.merge:
                # On the same disk as the model, and not taken for a checkpoint or for a part of it.
                merged = stack.enter_context(TemporaryDirectory(prefix="_merged-", dir=folder))
                print(f"merging {folder} into its base")
                save_merged(folder, merged)
                source = Path(merged)
            if args.dry_run:
                names = write_published(source, args.repo_id, args.dry_run, args.roles)
                if rows:
                    add_results(Path(args.dry_run), rows, args.repo_id)
                print("would be published:")
                for name in names:
                    size = (Path(args.dry_run) / name).stat().st_size
                    print(f"  {name:<32} {size / 1e6:10.3f} MB")
                print(f"written: {args.dry_run}; nothing was sent")
                return
            commit = push_folder(
                source,
                args.repo_id,
                private=args.private or None,
                revision=args.revision,
                roles=args.roles,
                saved_in=folder,
                retry=retry,
            )
    except (HubError, ValueError) as error:
        raise UserError(error) from error
    print(f"published: {commit.repo_url}")


def results_of(results: str, name: str) -> list[dict[str, Any]]:
    """The numbers of a results.json that belong to the model of that name, as rows of a card."""
    content = read_json(results, "measures")
    measures, judge = content["measures"], (content.get("settings") or {}).get("judge")
    needed = {"name", "model", "against", "status", "value", "ci_low", "ci_high", "n"}
    if not isinstance(measures, list) or not all(isinstance(m, dict) and needed <= m.keys() for m in measures):
        raise UserError(f"--results {results}: expected the results.json of `prefopt eval`")
    rows: dict[str, list[dict[str, Any]]] = {}
    for m in measures:
        title = _title(m["name"])
        if title is None or m["status"] != "ok" or (m["against"] and not m["name"].startswith("winrate")):
            # Of other measures than win rates, `against` marks a difference.
            continue
        numbers = [m["value"], *(end for end in (m["ci_low"], m["ci_high"]) if end is not None)]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise UserError(
                f"--results {results}: {m['name']} of {m['model']} has no finite value; run `prefopt eval` again"
            )
        title += f" against {m['against']}" if m["against"] else ""
        if judge and title.startswith("win rate") and not m["name"].startswith("winrate_judge"):
            title += f", judged by {judge}"
        rows.setdefault(m["model"], []).append(
            {
                "title": title,
                "metric": m["name"],
                "value": m["value"],
                "low": m["ci_low"],
                "high": m["ci_high"],
                "n": m["n"],
                "dataset": EVALUATION,
            }
        )
    if name not in rows:
        raise UserError(
            f"--results {results} has no numbers of {name!r}; name the model with --results_name, one of: "
            f"{', '.join(sorted(rows)) or 'none'}"
        )
    return rows[name]


def add_results(folder: Path, rows: list[dict[str, Any]], location: str | None = None) -> None:
    """Put rows of `prefopt eval` into a model's card, in place of earlier ones; `location` as in `write_card`."""
    facts = read_facts(folder)
    kept = [row for row in facts.get("results", []) if row["dataset"] != EVALUATION]
    write_card(folder, {**facts, "results": [*kept, *rows]}, location)


def _title(measure: str) -> str | None:
    """What the card calls a measure; None if it does not show it.

    >>> _title("rm.accuracy.heldout_labelers"), _title("winrate"), _title("winrate_greedy")
    ('pairwise accuracy, heldout labelers', 'win rate', None)
    """
    for name, title in SHOWN.items():
        if measure == name or measure.startswith(name + "."):
            return f"{title} {measure[len(name) + 1 :]}".replace("_", " ").strip()
    return None
