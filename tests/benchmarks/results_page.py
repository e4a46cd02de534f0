"""docs/results.md from the files that runs leave: every claim with figure, interval, n, seeds, weights and command.

    python tests/benchmarks/results_page.py --frontier runs/smollm2-frontier/frontier.json \
        --rankings runs/rankings/results.json --weights "SmolLM2-135M-Instruct" --commit abc123 > docs/results.md

A file that is not given leaves its section as "not yet measured".
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.evaluation.frontier import KNOBS, METHODS
from prefopt.evaluation.sweep import VERDICT

HEAD = """# Results on pretrained models

Every figure with its interval (95 %), its n, seeds, weights and the command that gives it. This page is written by
`tests/benchmarks/results_page.py` from the files that the runs leave; its end, by hand, is `results_notes.md` beside that.
"""
MISSING = "Not yet measured.\n"
# Written by hand: the text, how settings were chosen, what did not work.
NOTES = Path(__file__).with_name("results_notes.md")
FRONTIER = "prefopt frontier --config smollm2/frontier.yaml"
RANKINGS = "python tests/benchmarks/real_rankings.py"


def shown(m: dict[str, Any], digits: int = 3) -> str:
    return f"{m['value']:.{digits}f} [{m['ci_low']:.{digits}f}, {m['ci_high']:.{digits}f}]"


def explained(run: Path) -> str:
    """Mean of the values' explained variance over the second half of a run's rollouts; "" where nothing was learned by PPO."""
    state = run / "model" / "trainer_state.json"
    log = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    values = [entry["value/explained_variance"] for entry in log if "value/explained_variance" in entry]
    second = values[len(values) // 2 :]
    return f"{sum(second) / len(second):.2f}" if second else ""


def frontier(path: Path | None, weights: str) -> list[str]:
    lines = ["## Controlled sentiment: what each method gains and costs\n"]
    if path is None:
        return [*lines, f"`{FRONTIER}`\n", MISSING]
    results = json.loads(path.read_text(encoding="utf-8"))
    seeds = results["settings"]["seeds"]
    n = results["points"][0]["gold_gain"]["n"]
    lines.append(f"`{FRONTIER}`; weights {weights}; seeds {', '.join(map(str, seeds))}; {n} prompts in all.\n")
    for finding in results["findings"]:
        lines.append(f"- **{finding['title']}: {VERDICT[finding['holds']]}.** {' '.join(finding['evidence'])}")
    lines += [
        "",
        "| run | gold reward − SFT | win rate | KL, nats | bits per byte − SFT | win rate by seed | explained variance |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in results["points"]:
        name = f"{METHODS[p['method']]}, {KNOBS.get(p['method'], 'beta')} {p['knob']:g}"
        by_seed = "; ".join(shown(of["win_rate"], 2) for of in p["seeds"].values())
        runs = [path.parent / f"seed{seed}" / "runs" / f"{p['method']}_{p['knob']:g}" for seed in seeds]
        values = "; ".join(filter(None, map(explained, runs)))
        cells = [shown(p["gold_gain"]), shown(p["win_rate"]), shown(p["kl"], 2), shown(p["tax"], 4), by_seed, values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", "Explained variance is the values', mean of the second half of a run's rollouts, by seed.", ""]


def rankings(path: Path | None, weights: str) -> list[str]:
    lines = ["## Reward models on people's rankings\n"]
    if path is None:
        return [*lines, f"`{RANKINGS}`\n", MISSING]
    results = json.loads(path.read_text(encoding="utf-8"))
    settings = results.pop("settings")
    keys = ", ".join(f"{key} {settings[key]}" for key in ("seconds", "learning_rate", "lora_r", "max_length"))
    lines.append(f"`{RANKINGS}`; weights {weights}; {keys}. By seed.\n")
    lines += ["| source | model | accuracy | log loss | ECE | seconds | passes |", "|---|---|---|---|---|---|---|"]
    for source, of in results.items():
        bag = of["bag of words"]
        lines.append(f"| {source} | longer wins | {of['longer wins']} | | | | |")
        lines.append(f"| | bag of words | {shown(bag['accuracy'])} | {shown(bag['nll'])} | {shown(bag['ece'])} | | |")
        for number, seed in enumerate(of["seeds"]):
            for side, m in seed.items():
                cells = [shown(m["accuracy"]), shown(m["nll"]), shown(m["ece"]), f"{m['spent']['seconds']:.0f}"]
                lines.append(f"| | {side}, {number} | {' | '.join(cells)} | {m['passes']:.2f} |")
    return [*lines, ""]


def page(options: argparse.Namespace) -> str:
    commit = (
        [f"Settings frozen at commit {options.commit} before the test prompts were read.\n"] if options.commit else []
    )
    sections = [*frontier(options.frontier, options.weights), *rankings(options.rankings, options.weights)]
    return "\n".join([HEAD, *commit, *sections, NOTES.read_text(encoding="utf-8")]).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontier", type=Path)
    parser.add_argument("--rankings", type=Path)
    parser.add_argument("--weights", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--commit")
    print(page(parser.parse_args(argv)), end="")


if __name__ == "__main__":
    main()
