"""The loop: sample K answers, rank them, learn, evaluate, and again from the new policy.

    prefopt iterate --config recipes/tiny/iterate.yaml

A round is four steps, each a `prefopt` command with a section of the one YAML file: `sample`, `rank` (by reward models, a
judge, a function or people), `dpo` (or, with `method: ppo-ptx`, `reward` and `ppo_ptx`) and `evaluate`. A round starts from
the policy of the one before. DPO's reference is that policy, or with `reference: start` the one that all began with. The
reward model of `ppo-ptx` is trained anew from `reward_start` on the rankings of all rounds so far.

Round N is in OUTPUT_DIR/round-N: samples.jsonl, rankings.jsonl, policy. The policies of all rounds are compared in
OUTPUT_DIR/evaluation; iterate.html has a curve per round, report.html everything else. The loop stops when the ranker and
the held-out judge part: the rule is in iterate.json. A killed run goes on where it was, and more `rounds` go on from the last.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from prefopt.errors import UserError
from prefopt.evaluation.iterations import (
    Round,
    best_of,
    build_iterate_page,
    judged_win_rate,
    ranker_win_rate,
    results_of,
    verdict,
)
from prefopt.evaluation.results import BASELINE, jsonable
from prefopt.evaluation.run import EvaluationRun, parsed_mapping
from prefopt.evaluation.stages.generate import GenerateArguments
from prefopt.evaluation.stages.judge import called
from prefopt.inference.generate import derived_seed
from prefopt.inference.journal import fingerprint_of, source_state
from prefopt.inference.jsonl import read_json, read_jsonl, write_json, write_jsonl
from prefopt.recipes import dpo, evaluate, ppo_ptx, rank, reward, sample
from prefopt.recipes.common.arguments import parse, setting
from prefopt.recipes.common.conversations import prompts_from_messages
from prefopt.recipes.common.lock import lock
from prefopt.recipes.common.rows import check_fields, load_rows
from prefopt.recipes.common.steps import Commands, Steps
from prefopt.recipes.pipeline import KINDS

Section = dict[str, Any] | str | None
# Method -> its steps between `rank` and `evaluate`.
LEARNING = {"dpo": ("dpo",), "ppo-ptx": ("reward", "ppo_ptx")}
# Section -> what in it the rounds give; a command line wins over a file, so that it would be read nowhere.
GIVEN = {
    "sample": ("model_name_or_path", "dataset_name", "output", "seed"),
    "rank": ("samples", "output", "seed"),
    "dpo": ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "seed"),
    "reward": ("model_name_or_path", "dataset_name", "output_dir", "seed"),
    "ppo_ptx": ("model_name_or_path", "reward_model_name_or_path", "dataset_name", "output_dir", "seed"),
    "evaluate": ("models", "baseline", "output_dir", "report_dir", "seed"),
}
# Judge of an evaluation -> the key that names it there, and the ranker that it must not be.
JUDGES = {
    "gold": ("gold_judge", "function"),
    "human": ("human_judgements", None),
    "lm": ("lm_judge", "judge"),
    "reward": ("reward_judge", "reward_model"),
}
# Of a row of an evaluation, what is of one completion.
OF_COMPLETION = ("decoding", "sample", "completion", "ids", "truncated")


@dataclass
class IterateArguments:
    """Where it starts, how many rounds, and how each of them learns."""

    LEAST: ClassVar[dict[str, float]] = {"rounds": 1, "prompts_per_round": 1, "seed": 0}

    output_dir: str = setting("runs/iterate", "Folder of the rounds, their evaluation and the page.")
    policy: str | None = setting(None, "Policy to start from: folder or Hub id, whole or a LoRA adapter.")
    prompts: str | None = setting(None, "Rows of `prompt`, from which answers are sampled.")
    prompts_per_round: int | None = setting(
        None, "Prompts of a round, the next ones of the file each time; default: all."
    )
    rounds: int = setting(3, "Rounds, if the ranker is not exploited before.")
    method: Literal["dpo", "ppo-ptx"] = setting("dpo", "How a round learns from its rankings.")
    reference: Literal["previous", "start"] = setting(
        "previous", "Reference of DPO: the policy of the round before, or the one that all began with."
    )
    reward_start: str | None = setting(None, "With ppo-ptx, what reward models are trained from; default: policy.")
    seed: int = setting(0, "Seed of all rounds, each with seeds of its own.")
    sample: Section = setting(dict, "Settings of `prefopt sample`, but for models, rows and outputs.")
    rank: Section = setting(dict, "Settings of `prefopt rank`, but for models, rows and outputs.")
    dpo: Section = setting(dict, "Settings of `prefopt dpo`, but for models, rows and outputs.")
    reward: Section = setting(dict, "Settings of `prefopt reward`, but for models, rows and outputs.")
    ppo_ptx: Section = setting(dict, "Settings of `prefopt ppo-ptx`, but for models, rows and outputs.")
    evaluate: Section = setting(dict, "Settings of `prefopt eval`, but for models, rows and outputs.")

    def __post_init__(self) -> None:
        for name in ("sample", "rank", "dpo", "reward", "ppo_ptx", "evaluate"):
            setattr(self, name, parsed_mapping(name, getattr(self, name)))


class Iteration(Commands):
    """The rounds, in one folder."""

    kinds = {name: KINDS[name] for name in ("sample", "reward", "dpo", "ppo_ptx", "evaluate")} | {
        "rank": (rank.RankArguments,)
    }

    def __init__(self, args: IterateArguments) -> None:
        if not args.policy or not args.prompts:
            raise UserError(f"{'prompts' if args.policy else 'policy'} is required")
        if args.method == "ppo-ptx" and args.reference == "start":
            raise UserError("reference: start is of DPO; PPO-ptx stays near the policy that its round starts from")
        if given := [f"{name}.{key}" for name in GIVEN for key in GIVEN[name] if key in getattr(args, name)]:
            raise UserError(
                f"{', '.join(given)}: the rounds give models, rows, outputs and seeds themselves (policy, prompts, reference, "
                "reward_start, output_dir, seed); leave them out of the sections"
            )
        # A command reads its settings from a file.
        self._files = tempfile.TemporaryDirectory()
        super().__init__(Path(args.output_dir), Path(self._files.name), args.seed)
        self.args = args
        self.steps = ("sample", "rank", *LEARNING[args.method], "evaluate")
        for name in self.steps:
            (self.configs / f"{name}.yaml").write_text(yaml.safe_dump(getattr(args, name)), encoding="utf-8")
        self.judge = held_out_judge(args)

    def run(self) -> dict[str, Any]:
        """All rounds, or as many as the rule allows; the content of iterate.json."""
        args = self.args
        try:
            sections = self.settings(self.steps)
        except UserError as error:
            raise UserError(str(error).replace(f"{self.configs}/", "section ").replace(".yaml", "")) from error
        self.check()
        shared = {k: v for k, v in asdict(args).items() if k not in {*self.kinds, "output_dir", "rounds"}}
        shared |= {"policy": source_state(args.policy), "prompts": fingerprint_of(self.prompts)}
        done = Steps(self.root, total=args.rounds * (len(self.steps) + 1))
        lock(self.root / "steps" / "_lock", "output_dir", self.root)
        rounds: list[Round] = []
        results: dict[str, Any] = {}
        for number in range(1, args.rounds + 1):
            self.number = number
            markers = self.root / "steps" / f"round-{number}-*.json"
            if not self.folder.is_dir() and list(markers.parent.glob(markers.name)):
                raise UserError(
                    f"{self.folder} is gone, but steps of it are done: put it back, or delete {markers} and those of later "
                    "rounds to run them again"
                )
            for name, title, work in self.plan():
                settings = {"iterate": shared, "step": sections.get(name)}
                done.run(f"round-{number}-{name}", f"round {number}: {title}", settings, work)
            rounds.append(Round.of(read_json(self.folder / "round.json")))
            results = results_of(rounds, called(self.judge), self.ranker)
            write_json(self.root / "iterate.json", results)
            told = {key: value for key, value in shared.items() if value is not None}
            told |= {"policy": args.policy, "prompts": args.prompts}
            build_iterate_page(self.root / "iterate.html", results, told)
            if results["stopped"]:
                break
        for line in [
            *verdict(results),
            f"page: {self.root / 'iterate.html'}",
            f"policy: {self.policy_of(results['best'])}",
        ]:
            done.console.print(line)
        return results

    def check(self) -> None:
        """Raise what the first round would say only after sampling or training: of rows, of who ranks, of one answer to each
        prompt."""
        sampling, _ = self.arguments("sample", output=self.root)
        if sampling.k_max < 2:
            raise UserError(f"section sample: k_max is {sampling.k_max}; a ranking needs two answers or more")
        (ranking,) = self.arguments("rank", output=self.root)
        try:
            rank.ranker_of(ranking)
        except UserError as error:
            raise UserError(f"section rank: {error}") from error
        _, *stages = self.arguments("evaluate", output_dir=self.root)
        held_out = next(one for one in stages if isinstance(one, GenerateArguments))
        try:
            evaluate.held_out_prompts(held_out)
        except UserError as error:
            raise UserError(f"section evaluate: {error}") from error

    def plan(self) -> Iterator[tuple[str, str, Any]]:
        """Name, title and work of the steps of a round."""
        yield "sample", "sample", self.sample
        yield "rank", "rank", self.rank
        if self.args.method == "dpo":
            yield "dpo", "DPO from the rankings", self.dpo
        else:
            yield "reward", "reward model from all rankings so far", self.reward
            yield "ppo_ptx", "PPO-ptx", self.ppo_ptx
        yield "evaluate", "evaluate all policies", self.evaluate
        yield "compare", "compare with the best one before", self.compare

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """The rows from which answers are sampled."""
        return load_rows(
            self.args.prompts, key="prompts", check=check_fields("prompt"), convert=prompts_from_messages
        ).to_list()

    # ---- one round --------------------------------------------------------------------------------------------------
    @property
    def folder(self) -> Path:
        return self.folder_of(self.number)

    def folder_of(self, number: int) -> Path:
        return self.root / f"round-{number}"

    def policy_of(self, model: str) -> str:
        """Where a policy is, by its name in the evaluation."""
        return str(self.args.policy) if model == BASELINE else str(self.folder_of(int(model[6:])) / "policy")

    @property
    def models(self) -> list[str]:
        """The names of all policies up to this round's."""
        return [BASELINE, *(f"round_{number}" for number in range(1, self.number + 1))]

    @property
    def ranker(self) -> str:
        section = self.args.rank
        names = section.get("reward_model") or section.get("judge") or section.get("function")
        return ", ".join(names) if isinstance(names, list) else str(names)

    @property
    def keys(self) -> dict[str, Any]:
        """Of this round's learning: where it starts from, its seed, and that a killed one goes on."""
        seed = derived_seed(self.seed, self.number) >> 1
        return {"model_name_or_path": self.policy_of(self.models[-2]), "seed": seed}

    def sample(self) -> None:
        rows = self.prompts
        n = self.args.prompts_per_round or len(rows)
        first = (self.number - 1) * n
        write_jsonl(
            self.folder / "prompts.jsonl", [rows[i % len(rows)] for i in range(first, first + min(n, len(rows)))]
        )
        keys = {"dataset_name": self.folder / "prompts.jsonl", "output": self.folder / "samples.jsonl"}
        self.step(sample.main, "sample", **self.keys, **keys)

    def rank(self) -> None:
        keys = {"samples": self.folder / "samples.jsonl", "output": self.folder / "rankings.jsonl"}
        self.step(rank.main, "rank", seed=self.keys["seed"], **keys)

    def rankings(self, number: int) -> list[dict[str, Any]]:
        """What a round learns from, with what people ranked of it.

        Raises:
            UserError: people have not ranked theirs yet.
        """
        folder = self.folder_of(number)
        rows, waiting, labeled = (
            read_jsonl(folder / "rankings.jsonl"),
            folder / "rankings.people.jsonl",
            folder / "people.jsonl",
        )
        if not waiting.is_file():
            return rows
        if not labeled.is_file():
            raise UserError(
                f"round {number} waits for people: `prefopt label export {waiting} --out {folder / 'sheet.html'}`, then "
                f"`prefopt label import ANSWERS --out {labeled}`, and the same command again goes on"
            )
        return rows + read_jsonl(labeled)

    def learn(self, main: Any, name: str, output: str, **keys: object) -> None:
        """A training step, which goes on from its newest checkpoint."""
        folder = self.folder / output
        self.step(main, name, **{**self.keys, "output_dir": folder, "resume_from_checkpoint": "latest", **keys})

    def dpo(self) -> None:
        rows = self.folder / "training.jsonl"
        write_jsonl(rows, self.rankings(self.number))
        keys = {"ref_model_name_or_path": self.args.policy} if self.args.reference == "start" else {}
        self.learn(dpo.main, "dpo", "policy", dataset_name=rows, **keys)

    def reward(self) -> None:
        rows = self.folder / "training.jsonl"
        write_jsonl(rows, [row for number in range(1, self.number + 1) for row in self.rankings(number)])
        start = self.args.reward_start or self.args.policy
        self.learn(reward.main, "reward", "reward", model_name_or_path=start, dataset_name=rows)

    def ppo_ptx(self) -> None:
        keys = {"reward_model_name_or_path": self.folder / "reward", "dataset_name": self.folder / "prompts.jsonl"}
        self.learn(ppo_ptx.main, "ppo_ptx", "policy", **keys)

    # ---- what came of it --------------------------------------------------------------------------------------------
    def evaluate(self) -> None:
        """All policies so far; what was drawn and judged of the others is kept."""
        keys = {
            "output_dir": self.root / "evaluation",
            "report_dir": self.root,
            "models": json.dumps({model: self.policy_of(model) for model in self.models}),
            "baseline": BASELINE,
            "main_judge": self.judge,
        }
        self.step(lambda argv: evaluate.main(["all", *argv]), "evaluate", **keys)

    def compare(self) -> None:
        """Write round.json: the new policy by the ranker and by the held-out judge."""
        run = EvaluationRun(self.root / "evaluation")
        samples = {
            model: [
                row
                for row in run.measured_samples(model, self.args.evaluate.get("heldout_use_case"))
                if row["sample"] == 0
            ]
            for model in self.models
        }
        pairs = (run.stage("compare") or {"data": {"pairs": []}})["data"]["pairs"]
        rankings = self.held_out_rankings(samples)
        before = [Round.of(read_json(self.folder_of(number) / "round.json")) for number in range(1, self.number)]
        new, against = self.models[-1], best_of(before)
        measures = read_json(self.folder / "rankings.report.json", "measures")["measures"]
        found = Round(
            self.number,
            new,
            ranker_win_rate(rankings, samples, new, BASELINE),
            judged_win_rate(pairs, self.judge, new, BASELINE),
            against,
            ranker_win_rate(rankings, samples, new, against),
            judged_win_rate(pairs, self.judge, new, against),
            next((m["value"] for m in measures if m["name"] == "score"), float("nan")),
        )
        write_json(self.folder / "round.json", jsonable(asdict(found)))

    def held_out_rankings(self, samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The ranker's order of what all policies answered to each held-out prompt."""
        rows = []
        for answers in zip(*samples.values(), strict=True):
            kept = {name: value for name, value in answers[0].items() if name not in OF_COMPLETION}
            of = {"completions": [a["completion"] for a in answers], "truncated": [a["truncated"] for a in answers]}
            rows.append({**kept, **of})
        if all(len(set(row["completions"])) == 1 for row in rows):
            return []
        path, out = self.folder / "heldout_samples.jsonl", self.folder / "heldout_rankings.jsonl"
        write_jsonl(path, rows)
        self.step(rank.main, "rank", samples=path, output=out, people=0, keep="all", keep_tied=True)
        return read_jsonl(out)


def held_out_judge(args: IterateArguments) -> str:
    """The judge of the section `evaluate` that says whether it got better.

    Raises:
        UserError: there is none, or it is the ranker.
    """
    named = [judge for judge, (key, _) in JUDGES.items() if args.evaluate.get(key)]
    judge = args.evaluate.get("main_judge") or next(iter(named), None)
    if judge not in named:
        raise UserError(
            f"evaluate: expected a held-out judge (one of {', '.join(key for key, _ in JUDGES.values())})"
            f"{f', and main_judge {judge} names none' if judge else ''}"
        )
    key, ranker = JUDGES[judge]
    rankers = args.rank.get(ranker) or [] if ranker else []
    # However the path is written.
    if os.path.realpath(args.evaluate[key]) in map(
        os.path.realpath, [rankers] if isinstance(rankers, str) else rankers
    ):
        raise UserError(f"evaluate: {key} {args.evaluate[key]} is the ranker too; a held-out judge is another one")
    return judge


def main(argv: list[str] | None = None) -> None:
    """Run the rounds."""
    (args,) = parse((IterateArguments,), argv, "prefopt iterate", __doc__)
    Iteration(args).run()
