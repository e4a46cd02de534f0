"""The whole of InstructGPT in one command: to PPO-ptx, DPO and a report, from random weights or a pretrained model.

    prefopt pipeline --config recipes/tiny/pipeline.yaml
    prefopt pipeline --config recipes/smollm2/pipeline.yaml

Without a model the sandbox's closed world is pretrained on; a pretrained model learns to finish sentences of real text
with a good feeling, of which a lexicon is the gold reward. Every step below is one `prefopt` command with one YAML file of
`config_dir`, and the data between the steps are JSONL files in `output_dir/data`; so any step can be replaced by one's
own. A finished step is kept: run the command again after an interruption and it begins with the step that it was in.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from trl import ModelConfig

from prefopt.errors import UserError
from prefopt.evaluation.run import EvaluationRun
from prefopt.inference.generate import generate
from prefopt.inference.jsonl import read_json, read_jsonl, write_json, write_jsonl
from prefopt.inference.scoring import score_completions
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.loading import load_language_model
from prefopt.recipes import best_of_n, dpo, evaluate, ppo_ptx, reward, sample, sft
from prefopt.recipes.common.arguments import config_folder, parse, setting
from prefopt.recipes.common.sources import load_source
from prefopt.recipes.common.steps import Commands, Steps
from prefopt.sandbox import SentimentWorld, World, build_model, build_tokenizer, labelers
from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.shared.ranges import Range, check_ranges

TINY = Path(__file__).parent / "tiny"
Step = tuple[str, str, Callable[[], None]]
# Steps that are no command with settings of its own.
WITHOUT_FILE = ("data", "label", "select")
SFT = (sft.SFTArguments, sft.SFTStepConfig, ModelConfig)
PPO = (ppo_ptx.PPOPtxArguments, PPOPtxConfig, ModelConfig)
# Step with a file -> the dataclasses of its keys.
KINDS = {
    "pretrain": SFT,
    "sft": SFT,
    "sample": (sample.SampleArguments, ModelConfig),
    "reward": (reward.RewardArguments, RankedRewardConfig, ModelConfig),
    "ppo_start": SFT,
    "ppo": PPO,
    "ppo_ptx": PPO,
    "dpo": (dpo.DPOArguments, RankedDPOConfig, ModelConfig),
    "best_of_n": (best_of_n.BestOfNArguments, ModelConfig),
    "evaluate": evaluate.ARGUMENTS,
}
# More would not fit into a memory or a lifetime.
SIZE = Range(1, most=10**7, is_whole=True)


@dataclass
class RealTextArguments:
    """A pretrained model and text, in place of the sandbox's."""

    model_name_or_path: str | None = setting(
        None, "Pretrained model to start from, folder or Hub id; default: a small one from random weights."
    )
    texts: list[str] = setting(
        lambda: [], "With a pretrained model: rows {text} whose sentences it learns to finish, files or Hub ids."
    )
    pretrain_text: str | None = setting(None, "With a pretrained model: rows {text} that PPO-ptx trains on.")
    pretrain_config: str | None = setting(None, "Configuration of pretrain_text, if that is a Hub id.")
    heldout_text: str | None = setting(
        None, "Rows {text} of which the alignment tax is measured; default: the split `test` of pretrain_text."
    )


REAL_TEXT = [field.name for field in fields(RealTextArguments)]


@dataclass
class PipelineArguments(RealTextArguments):
    """Sizes of the run; the training settings are in the YAML files of `config_dir`."""

    output_dir: str = setting("runs/demo", "Folder of models, data and the report.")
    config_dir: str | None = setting(
        None, "Folder with one YAML file per step; default: that of --config, else recipes/tiny."
    )
    seed: int = setting(0, "Seed of the world, the weights, the data and the training.")
    corpus_documents: int = setting(40000, "Pretraining documents.")
    heldout_documents: int = setting(400, "Documents for bits per byte.")
    sft_prompts: int = setting(1200, "Demonstrations.")
    rm_prompts: int = setting(3600, "Ranked prompts for the reward model and DPO.")
    rl_prompts: int = setting(4000, "Prompts of PPO.")
    tuning_prompts: int = setting(200, "Validation prompts; they choose the SFT epoch.")
    test_prompts: int = setting(450, "Held-out prompts of the evaluation.")
    max_new_tokens: int = setting(24, "Length limit of a completion, in tokens.")

    def __post_init__(self) -> None:
        counts = [name for name in vars(self) if name.endswith(("_documents", "_prompts", "_tokens"))]
        check_ranges(self, {"seed": Range(is_whole=True), **dict.fromkeys(counts, SIZE)})


class Pipeline(Commands):
    """The steps, in the order of the paper; each method is one."""

    models = ("sft", "ppo", "ppo_ptx", "dpo")
    # The model that is sampled from for the labelers, and that the reward model starts from.
    sampled = "sft-epochs"
    kinds = KINDS
    recipe = "tiny"

    def __init__(self, args: PipelineArguments) -> None:
        super().__init__(Path(args.output_dir), Path(args.config_dir or TINY), args.seed)
        self.args = args
        self.data = self.root / "data"
        for name in self.steps_with_file():
            self.config(name)
        self.world = self.make_world()

    def make_world(self) -> World | SentimentWorld:
        return World(seed=self.args.seed)

    def plan(self) -> list[Step]:
        """Name, title and work of every step."""
        return [
            ("data", "the world: corpus, prompts, demonstrations", self.write_data),
            ("pretrain", "pretrain the base model", self.pretrain),
            ("sft", "supervised fine-tuning, every epoch saved", self.sft),
            *self.to_reward_model(),
            ("select", "choose the SFT epoch by reward-model score", self.select),
            ("ppo_start", "the start of PPO: demonstrations + 10 % pretraining text", self.ppo_start),
            *self.policies(),
            ("evaluate", "evaluate and report", self.evaluate),
        ]

    def to_reward_model(self) -> list[Step]:
        return [
            ("sample", "sample K = 4..9 completions per prompt", self.sample),
            ("label", "simulated labelers rank them", self.label),
            ("reward", "reward model from the rankings", self.reward),
        ]

    def policies(self) -> list[Step]:
        return [
            ("ppo", "PPO", self.ppo),
            ("ppo_ptx", "PPO-ptx", self.ppo_ptx),
            ("dpo", "DPO from rankings", self.dpo),
        ]

    def run(self, steps: Sequence[Step] | None = None) -> None:
        """All steps, or the first ones; those that are done are skipped. A report ends the last one."""
        every = self.plan()
        settings = self.settings(self.steps_with_file())
        done = Steps(self.root, total=len(every))
        sizes = {key: value for key, value in asdict(self.args).items() if key != "config_dir"}
        # What is at its default of no model is not in the markers of runs before there were these keys.
        if self.args.model_name_or_path is None:
            sizes = {key: value for key, value in sizes.items() if key not in REAL_TEXT}
        for name, title, work in every if steps is None else steps:
            done.run(name, title, {"pipeline": sizes, "step": settings.get(name)}, work)
        if steps is None:
            # On every run, so that the wall time of the evaluation itself is in it.
            self.evaluation("report", done.seconds)
            done.console.print(f"report: {self.root / 'report.html'}\nresults: {self.root / 'results.json'}")

    def steps_with_file(self) -> list[str]:
        return [name for name, _, _ in self.plan() if name not in WITHOUT_FILE]

    # ---- the three steps ----------------------------------------------------------------------------------------
    def write_data(self) -> None:
        world, args = self.world, self.args
        for split, count in (("train", args.corpus_documents), ("test", args.heldout_documents)):
            write_jsonl(self.data / f"corpus_{split}.jsonl", [{"text": t} for t in world.corpus(split, count)])
        for split in ("sft", "rm", "rl", "tuning", "test"):
            prompts = world.prompts(split, getattr(args, f"{split}_prompts"))
            rows = [{"prompt": prompt, "use_case": world.use_case(prompt)} for prompt in prompts]
            write_jsonl(self.data / f"prompts_{split}.jsonl", rows)
        if isinstance(world, World):
            write_jsonl(self.data / "tasks.jsonl", [asdict(task) for task in world.knowledge_tasks()])
        for split in ("sft", "tuning"):
            rows = world.demonstrations(split, getattr(args, f"{split}_prompts"))
            write_jsonl(self.data / f"demonstrations_{split}.jsonl", rows)

    def pretrain(self) -> None:
        start = self.root / "random-weights"
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(start)
        build_model(tokenizer, seed=self.args.seed).save_pretrained(start)
        self.anew(sft.main, "pretrain", model_name_or_path=start, dataset_name=self.data / "corpus_train.jsonl",
                  output_dir=self.root / "base")  # fmt: skip

    def sft(self) -> None:
        self.anew(sft.main, "sft", model_name_or_path=self.root / "base",
                  dataset_name=self.data / "demonstrations_sft.jsonl",
                  eval_dataset_name=self.data / "demonstrations_tuning.jsonl",
                  output_dir=self.root / "sft-epochs")  # fmt: skip

    def sample(self) -> None:
        for split in ("rm", "test"):
            self.step(sample.main, "sample", model_name_or_path=self.root / self.sampled,
                      dataset_name=self.data / f"prompts_{split}.jsonl", output=self.data / f"samples_{split}.jsonl", overwrite=True,
                      max_new_tokens=self.args.max_new_tokens)  # fmt: skip

    def label(self) -> None:
        """Training labelers rank the training prompts; both groups rank the held-out ones, for the accuracies."""
        for split, group in (("rm", "train"), ("test", "train"), ("test", "heldout")):
            rng = random.Random(f"{self.args.seed} {split} {group}")
            people = labelers(self.world, group)
            rows = [
                rng.choice(people).label(row["prompt"], row["completions"])
                | {"truncated": row["truncated"], "use_case": row["use_case"]}
                for row in read_jsonl(self.data / f"samples_{split}.jsonl")
            ]
            write_jsonl(self.data / f"rankings_{split}_{group}_labelers.jsonl", rows)

    def reward(self) -> None:
        self.anew(reward.main, "reward", model_name_or_path=self.root / self.sampled,
                  dataset_name=self.data / "rankings_rm_train_labelers.jsonl",
                  center_on=self.data / "demonstrations_sft.jsonl", output_dir=self.root / "reward")  # fmt: skip

    def select(self) -> None:
        """Keep the epoch with the best reward-model score on validation prompts, not the best loss (section 3.5)."""
        judge = load_reward_model(self.root / "reward")
        prompts = [row["prompt"] for row in read_jsonl(self.data / "prompts_tuning.jsonl")]
        state = read_json(self.root / "sft-epochs" / "trainer_state.json", "log_history")
        losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        epochs = []
        checkpoints = (self.root / "sft-epochs").glob("checkpoint-*")
        for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1])):
            model, tokenizer = load_language_model(checkpoint)
            drawn = generate(model, tokenizer, prompts, max_new_tokens=self.args.max_new_tokens, batch_size=256,
                             seed=self.args.seed)  # fmt: skip
            scores = score_completions(judge, tokenizer, prompts, [c[0] for c in drawn], batch_size=256)
            epochs.append(
                {
                    "epoch": len(epochs) + 1,
                    "rm_score": sum(scores) / len(scores),
                    "validation_loss": losses[int(checkpoint.name.split("-")[1])],
                    "checkpoint": str(checkpoint.relative_to(self.root)),
                }
            )
        best = max(epochs, key=lambda entry: entry["rm_score"])
        write_json(self.root / "sft_selection.json", {"epochs": epochs, "chosen": best})

    def ppo_start(self) -> None:
        """Appendix C.3: the pretrained model, two epochs of demonstrations with 10 % pretraining text mixed in.

        The result is what `sft` means from here on: PPO's start, every KL reference, the win-rate baseline.
        """
        self.anew(sft.main, "ppo_start", model_name_or_path=self.root / "base",
                  dataset_name=self.data / "demonstrations_sft.jsonl",
                  pretrain_dataset_name=self.data / "corpus_train.jsonl", output_dir=self.root / "sft")  # fmt: skip

    def ppo(self) -> None:
        self.anew(self.train_ppo, "ppo", output_dir=self.root / "ppo", **self.ppo_inputs())

    def ppo_ptx(self) -> None:
        text = self.data / "corpus_train.jsonl"
        keys = {"output_dir": self.root / "ppo_ptx", "pretrain_dataset_name": text, **self.ppo_inputs()}
        self.anew(self.train_ppo, "ppo_ptx", **keys)

    def ppo_inputs(self) -> dict[str, object]:
        return {
            "model_name_or_path": self.root / "sft",
            "reward_model_name_or_path": self.root / "reward",
            "dataset_name": self.data / "prompts_rl.jsonl",
            "max_completion_length": self.args.max_new_tokens,
        }

    def dpo(self) -> None:
        self.anew(dpo.main, "dpo", output_dir=self.root / "dpo", **self.dpo_inputs())

    def dpo_inputs(self) -> dict[str, object]:
        rankings = self.data / "rankings_rm_train_labelers.jsonl"
        return {"model_name_or_path": self.root / "sft", "dataset_name": rankings}

    def train_ppo(self, argv: list[str]) -> None:
        """PPO is trained on the reward model; the gold reward is only watched, to show over-optimization."""

        def gold(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
            return [self.world.gold_reward(p, c).total for p, c in zip(prompts, completions, strict=True)]

        ppo_ptx.main(argv, monitors=[gold])

    # ---- what came of it ----------------------------------------------------------------------------------------
    def evaluate(self) -> None:
        """Every stage of `prefopt eval`, between whose first two simulated labelers label what was generated."""
        self.evaluation("generate")
        self.label_completions()
        self.evaluation("all")

    def evaluation(self, stage: str, wall_seconds: dict[str, float] | None = None) -> None:
        """One stage, the gold reward being the world's."""
        root, data = self.root, self.data
        groups = ("train", "heldout")
        keys = {
            "output_dir": root / "evaluation",
            "report_dir": root,
            "models": json.dumps(self.evaluated()),
            "prompts": data / "prompts_test.jsonl",
            "max_new_tokens": self.args.max_new_tokens,
            "human_judgements": root / "evaluation" / "labels.jsonl",
            "labeler_groups": json.dumps(
                {f"{group}_labelers": [person.name for person in labelers(self.world, group)] for group in groups}
            ),
            "reward_judge": root / "reward",
            "reward_models": json.dumps({"reward_model": str(root / "reward")}),
            "rankings": json.dumps({f"{g}_labelers": str(data / f"rankings_test_{g}_labelers.jsonl") for g in groups}),
            "reward_demonstrations": data / "demonstrations_sft.jsonl",
            "pretraining_text": data / "corpus_test.jsonl",
            **self.more_to_evaluate(),
        }

        def run(argv: list[str]) -> None:
            evaluate.main([stage, *argv], gold=self.world.gold_reward, wall_seconds=wall_seconds)

        self.step(run, "evaluate", **keys)

    def evaluated(self) -> dict[str, str]:
        """Name and place of every model."""
        return {name: str(self.root / name) for name in self.models}

    def more_to_evaluate(self) -> dict[str, object]:
        """What only a closed world has."""
        return {
            "heldout_use_case": self.world.held_out_use_case,
            "heldout_tasks": self.data / "tasks.jsonl",
            "sft_selection": self.root / "sft_selection.json",
        }

    def label_completions(self) -> None:
        """A labeler of each group ranks, rates and flags the models' samples of every held-out prompt."""
        run = EvaluationRun(self.root / "evaluation")
        drawn = {name: [row for row in run.completions(name) if row["sample"] == 0] for name in self.evaluated()}
        rng = random.Random(f"{self.args.seed} evaluation")
        people = [labelers(self.world, group) for group in ("train", "heldout")]
        rows = []
        for answers in zip(*drawn.values(), strict=True):
            prompt, texts = answers[0]["prompt"], [answer["completion"] for answer in answers]
            for group in people:
                label = rng.choice(group).label(prompt, texts)
                rows.append({"id": answers[0]["id"], "models": list(drawn), **label})
        write_jsonl(run.folder / "labels.jsonl", rows)


class PretrainedPipeline(Pipeline):
    """The steps from a pretrained model on, on real text: one SFT run, in which what `sft` means ends, and best-of-n."""

    sampled = "sft"
    recipe = "smollm2"

    def make_world(self) -> SentimentWorld:
        args = self.args
        if not args.texts or not args.pretrain_text:
            raise UserError("texts and pretrain_text are required with model_name_or_path: rows {text}")
        held_out = (
            (args.heldout_text, None, "train")
            if args.heldout_text
            else (args.pretrain_text, args.pretrain_config, "test")
        )
        return SentimentWorld(
            [text for name in args.texts for text in _texts(name, "texts")],
            _texts(args.pretrain_text, "pretrain_text", args.pretrain_config),
            _texts(held_out[0], "heldout_text", *held_out[1:]),
            seed=args.seed,
        )

    def plan(self) -> list[Step]:
        return [
            ("data", "the text: sentences to finish, demonstrations, documents", self.write_data),
            ("sft", "supervised fine-tuning", self.sft),
            *self.to_reward_model(),
            *self.policies(),
            ("best_of_n", "best of n by the reward model", self.best_of_n),
            ("evaluate", "evaluate and report", self.evaluate),
        ]

    def sft(self) -> None:
        self.anew(sft.main, "sft", model_name_or_path=self.args.model_name_or_path,
                  dataset_name=self.data / "demonstrations_sft.jsonl", output_dir=self.root / "sft")  # fmt: skip

    def best_of_n(self) -> None:
        self.step(best_of_n.main, "best_of_n", model_name_or_path=self.root / "sft",
                  reward_model_name_or_path=self.root / "reward", dataset_name=self.data / "prompts_test.jsonl",
                  output=self.root / "best_of_n.jsonl", overwrite=True,
                  max_new_tokens=self.args.max_new_tokens)  # fmt: skip

    def evaluated(self) -> dict[str, str]:
        return super().evaluated() | {"best_of_n": str(self.root / "best_of_n.jsonl")}

    def more_to_evaluate(self) -> dict[str, object]:
        return {}


def _texts(name: str, key: str, config: str | None = None, split: str = "train") -> list[str]:
    rows = load_source(name, key, split, config)
    if "text" not in rows.column_names:
        raise UserError(f"{key}: {name} has no column 'text'; its columns are {', '.join(rows.column_names)}")
    return [text for text in rows["text"] if text]


def pipeline_of(args: PipelineArguments) -> Pipeline:
    """The pipeline that the arguments ask for."""
    return (Pipeline if args.model_name_or_path is None else PretrainedPipeline)(args)


def main(argv: list[str] | None = None) -> None:
    """Run the pipeline."""
    (args,) = parse((PipelineArguments,), argv, "prefopt pipeline", __doc__)
    args.config_dir = str(args.config_dir or config_folder(argv) or TINY)
    pipeline_of(args).run()
