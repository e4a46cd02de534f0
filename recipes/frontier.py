"""The frontier of reward against KL on a pretrained model: every method over its own knob, with several seeds.

    prefopt frontier --config recipes/smollm2/frontier.yaml
    prefopt frontier --config recipes/smollm2/frontier.yaml --dry_run true     # the estimate alone

The controlled-sentiment experiment of the DPO paper (arXiv:2305.18290, section 6.1). Of every seed `prefopt pipeline`'s
steps up to the reward model give an SFT model, rankings and a reward model; from these PPO and PPO-ptx are trained over
`kl_coefs`, DPO (all pairs, Plackett-Luce, best against worst, with pretraining text) over `betas`, and best-of-n is drawn over `best_of`. Each
run is measured on the same held-out prompts and documents. Start the command once per core: each takes the next job that
nobody works on. A killed job goes on from its newest checkpoint when the command is run again.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.errors import UserError
from prefopt.evaluation.frontier import METHODS, Measured, build_frontier_page, findings, results_of
from prefopt.evaluation.sweep import VERDICT
from prefopt.inference.generate import Completion, generate
from prefopt.inference.journal import is_kept, kept_rows
from prefopt.inference.jsonl import read_json, read_jsonl, write_json, write_jsonl
from prefopt.inference.likelihood import bits_per_byte, token_divergence
from prefopt.inference.scoring import score_completions
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.loading import load_language_model, load_tokenizer
from prefopt.rankings.row import best_and_worst
from prefopt.recipes import dpo
from prefopt.recipes.common.arguments import config_folder, parse, read_config, setting
from prefopt.recipes.common.steps import command_line
from prefopt.recipes.pipeline import PipelineArguments, PretrainedPipeline, RealTextArguments, Step

# Method -> the file of its settings, its knob, and the keys that make it what it is.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("ppo", "kl_coef", {}),
    "ppo_ptx": ("ppo_ptx", "kl_coef", {}),
    "dpo": ("dpo", "beta", {}),
    "dpo_plackett_luce": ("dpo", "beta", {"loss_type": "plackett_luce"}),
    "dpo_best_worst": ("dpo", "beta", {}),
    "dpo_ptx": ("dpo_ptx", "beta", {}),
}
WAIT = 10.0  # seconds between two looks at jobs of other processes
LOADING = 15.0  # seconds of each job that go by before its first token


@dataclass
class FrontierArguments(RealTextArguments):
    """Which runs; model, text and sizes are those of the pipeline unless they are given here."""

    output_dir: str = setting("runs/frontier", "Folder of the seeds, the runs and the page.")
    pipeline: str | None = setting(
        None, "Settings of `prefopt pipeline` for a pretrained model; default: pipeline.yaml beside --config."
    )
    seeds: list[int] = setting(lambda: [0, 1, 2], "Each with prompts, labelers, reward model and runs of its own.")
    methods: list[str] = setting(lambda: [*RUNS, "best_of_n"], f"Some of {', '.join(METHODS)}.")
    kl_coefs: list[float] = setting(lambda: [0.02, 0.1, 0.4], "kl_coef of PPO and PPO-ptx.")
    betas: list[float] = setting(lambda: [0.05, 0.3], "beta of DPO.")
    best_of: list[int] = setting(lambda: [2, 4, 8], "n of best-of-n; the greatest is drawn.")
    prompts: str = setting("test", "Which prompts are measured: `tuning` to choose settings, then `test`.")
    save_steps: int = setting(10, "Steps between checkpoints of a run.")
    batch_size: int = setting(48, "Sequences per forward of the measurements.")
    dry_run: bool = setting(False, "Print the estimate and stop.")


@dataclass(frozen=True)
class Run:
    """One run: a method at one value of its knob. SFT and best-of-n, which train nothing, have the knob 0."""

    method: str
    knob: float

    @property
    def name(self) -> str:
        return f"{self.method}_{self.knob:g}" if self.method in RUNS else self.method


class Seed:
    """The pipeline of one seed, and its runs."""

    def __init__(self, args: FrontierArguments, settings: PipelineArguments, seed: int) -> None:
        self.args, self.root = args, Path(args.output_dir) / f"seed{seed}"
        keys = {field.name: getattr(settings, field.name) for field in fields(settings)}
        self.settings = PipelineArguments(**keys | {"seed": seed, "output_dir": str(self.root / "start")})

    @cached_property
    def pipeline(self) -> PretrainedPipeline:
        return PretrainedPipeline(self.settings)

    def first_steps(self) -> list[Step]:
        steps = self.pipeline.plan()
        return steps[: 1 + [name for name, _, _ in steps].index("reward")]

    def prepare(self) -> None:
        """Data, SFT, rankings and reward model."""
        pipeline = self.pipeline
        pipeline.run(self.first_steps())
        rows = [
            best_and_worst({name: row[name] for name in ("prompt", "completions", "ranks", "truncated")})
            for row in read_jsonl(pipeline.data / "rankings_rm_train_labelers.jsonl")
        ]
        write_jsonl(pipeline.data / "rankings_rm_best_worst.jsonl", [row for row in rows if row is not None])

    @property
    def is_prepared(self) -> bool:
        return (self.root / "start" / "data" / "rankings_rm_best_worst.jsonl").is_file()

    def inputs(self, point: Run) -> dict[str, Any]:
        """All that the numbers of a run depend on."""
        args, start = self.args, self.root / "start"
        measured = [args.prompts, args.best_of if point.method == "best_of_n" else None]
        config = read_config(str(self.pipeline.config(RUNS[point.method][0]))) if point.method in RUNS else {}
        run = read_json(start / "steps" / "reward.json", "run")["run"]
        return {"point": asdict(point), "measured": measured, "config": config, "start": run}

    def rows_of(self, point: Run) -> Path:
        return self.root / "runs" / point.name / f"measured_{self.args.prompts}.jsonl"

    def is_done(self, point: Run) -> bool:
        return self.is_prepared and is_kept(self.rows_of(point), self.inputs(point))

    def run(self, point: Run) -> None:
        """Train and measure, unless it is done."""
        folder = self.rows_of(point).parent
        known = folder / "settings.json"
        inputs = self.inputs(point)
        trained = {key: value for key, value in inputs.items() if key != "measured"}
        if known.is_file() and read_json(known) != trained:
            raise UserError(
                f"{folder} was begun with other settings, so it is not gone on with; choose another output_dir, or "
                "delete it to train it anew"
            )
        write_json(known, trained)
        if point.method in RUNS:
            self.train(point, folder / "model")
        kept_rows(self.rows_of(point), inputs, partial(self.measure, point, folder / "model"))
        for checkpoint in (folder / "model").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def train(self, point: Run, folder: Path) -> None:
        pipeline, (config, knob, more) = self.pipeline, RUNS[point.method]
        rankings = "best_worst" if point.method == "dpo_best_worst" else "train_labelers"
        keys: dict[str, Any] = {
            "output_dir": folder,
            "seed": pipeline.args.seed,
            knob: point.knob,
            "save_strategy": "steps",
            "save_steps": self.args.save_steps,
            "save_total_limit": 1,
            "resume_from_checkpoint": "latest",
            **more,
        }
        if config.endswith("_ptx"):
            keys["pretrain_dataset_name"] = pipeline.data / "corpus_train.jsonl"
        if knob == "beta":
            keys |= {
                "model_name_or_path": pipeline.root / "sft",
                "dataset_name": pipeline.data / f"rankings_rm_{rankings}.jsonl",
            }
            dpo.main(command_line(pipeline.config(config), **keys))
            return
        keys |= pipeline.ppo_inputs()
        pipeline.train_ppo(command_line(pipeline.config(config), **keys))

    def measure(self, point: Run, folder: Path) -> Iterator[dict[str, Any]]:
        """A row per prompt (gold reward, proxy, KL to SFT of a sample) and per held-out document (nats, bytes)."""
        pipeline, size = self.pipeline, self.args.batch_size
        prompts = [row["prompt"] for row in read_jsonl(pipeline.data / f"prompts_{self.args.prompts}.jsonl")]
        model, tokenizer = load_language_model(pipeline.root / "sft" if point.method not in RUNS else folder)
        judge = load_reward_model(pipeline.root / "reward")
        n = max(self.args.best_of) if point.method == "best_of_n" else 1
        how = {"max_new_tokens": pipeline.args.max_new_tokens, "batch_size": size, "seed": pipeline.args.seed}
        drawn = generate(model, tokenizer, prompts, num_return=n, **how)
        repeated = [prompt for prompt in prompts for _ in range(n)]
        flat = [completion for completions in drawn for completion in completions]
        proxy = score_completions(judge, tokenizer, repeated, flat, size)
        gold = [pipeline.world.gold_reward(p, c.text) for p, c in zip(repeated, flat, strict=True)]
        if point.method == "best_of_n":
            for i in range(0, len(flat), n):
                yield {"gold": [score.total for score in gold[i : i + n]], "proxy": proxy[i : i + n]}
            return
        kl = [0.0] * len(prompts)
        if point.method in RUNS:
            sft, _ = load_language_model(pipeline.root / "sft")
            ids = [completion.ids for completion in flat]
            kl = [float(d.kl.sum()) for d in token_divergence(model, sft, tokenizer, prompts, ids, size)]
        for prompt, completion, score, of_proxy, nats in zip(prompts, flat, gold, proxy, kl, strict=True):
            yield {"prompt": prompt, **_shown(completion), "gold": score.total, "fluency": score.fluency,
                   "proxy": of_proxy, "kl": nats}  # fmt: skip
        texts = [row["text"] for row in read_jsonl(pipeline.data / "corpus_test.jsonl")]
        found = bits_per_byte(model, tokenizer, texts, max(1, size // 8))
        for nats, size_of_text in zip(found.nats.tolist(), found.bytes.tolist(), strict=True):
            yield {"nats": nats, "bytes": size_of_text}


def _shown(completion: Completion) -> dict[str, Any]:
    return {"completion": completion.text, "tokens": len(completion.ids), "truncated": completion.truncated}


class Frontier:
    """The jobs of all seeds, which processes share, and the page."""

    def __init__(self, args: FrontierArguments, settings: PipelineArguments) -> None:
        self.args, self.root = args, Path(args.output_dir)
        self.settings = settings
        self.seeds = [Seed(args, settings, seed) for seed in args.seeds]
        knobs = {"kl_coef": args.kl_coefs, "beta": args.betas}
        self.points = [Run("sft", 0.0)]
        for method in args.methods:
            self.points += (
                [Run(method, knob) for knob in knobs[RUNS[method][1]]] if method in RUNS else [Run(method, 0.0)]
            )

    def run(self) -> None:
        """Do what nobody else does, wait for the rest, and write the page."""
        if self.args.dry_run or not self.root.exists():
            self.tell_plan()
        if self.args.dry_run:
            return
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        for seed in self.seeds:
            if seed.is_prepared:  # by the same settings, or this stops
                seed.pipeline.run(seed.first_steps())
        while (job := self.next_job()) is not None:
            name, work, lock = job
            start = time.monotonic()
            print(f"{time.strftime('%H:%M')} {name}: begins", flush=True)
            try:
                work()
            finally:
                lock.release()
            print(f"{time.strftime('%H:%M')} {name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
        self.report()

    def next_job(self) -> tuple[str, Callable[[], None], FileLock] | None:
        """The next job that is neither done nor another process's, which waits for those; None when all are done."""
        while True:
            waits = False
            for name, is_done, is_ready, work in self.jobs():
                if is_done():
                    continue
                lock = FileLock(self.root / "locks" / f"{name.replace('/', '_')}.lock")
                try:
                    if is_ready():
                        lock.acquire(timeout=0)
                        if not is_done():
                            return name, work, lock
                        lock.release()
                        continue
                except Timeout:
                    pass
                waits = True
            if not waits:
                return None
            time.sleep(WAIT)

    def jobs(self) -> Iterator[tuple[str, Callable[[], bool], Callable[[], bool], Callable[[], None]]]:
        """Name, whether it is done, whether it can begin, and its work."""
        for seed in self.seeds:
            yield f"{seed.root.name}/start", lambda s=seed: s.is_prepared, lambda: True, seed.prepare
        for point in self.points:
            for seed in self.seeds:
                yield (
                    f"{seed.root.name}/{point.name}",
                    lambda s=seed, p=point: s.is_done(p),
                    lambda s=seed: s.is_prepared,
                    lambda s=seed, p=point: s.run(p),
                )

    # ---- how long it takes --------------------------------------------------------------------------------------
    def tell_plan(self) -> None:
        """What each job takes by a measurement of this machine, before any of them begins."""
        speeds = measured_speeds(str(self.settings.model_name_or_path))
        print("tokens a second: " + ", ".join(f"{name} {value:.0f}" for name, value in speeds.items()))
        kinds = {"start": 1, "sft": 1}
        for point in self.points[1:]:
            kinds[point.method] = kinds.get(point.method, 0) + 1
        total = 0.0
        for kind, count in kinds.items():
            seconds = self.seconds(kind, speeds)
            total += seconds * count
            print(f"{kind:<20} {count} a seed, {seconds / 60:.1f} min each")
        total *= len(self.seeds)
        print(f"in all {total / 3600:.1f} hours of one core, {total / 7200:.1f} hours with two processes", flush=True)

    def seconds(self, kind: str, speeds: Mapping[str, float]) -> float:
        """Seconds of a job, from the numbers of tokens that it draws, reads and trains on."""
        sizes, config = self.settings, Path(str(self.settings.config_dir))
        new, length = sizes.max_new_tokens, sizes.max_new_tokens + 6
        ranked = sizes.rm_prompts * (6 + 6.5 * new)
        prompts = getattr(sizes, f"{self.args.prompts}_prompts")
        text = sizes.heldout_documents * 280
        draws = prompts * (max(self.args.best_of) if kind == "best_of_n" else 1)
        reading = draws * length * (3 if kind in RUNS else 1) + (0 if kind == "best_of_n" else text)
        measuring = draws * new / speeds["generation"] + reading / speeds["forward"]
        train, forward = speeds["training"], speeds["forward"]
        if kind == "start":
            sampled = (sizes.rm_prompts + sizes.test_prompts) * 6.5 * new / speeds["generation"]
            return 3 * LOADING + sizes.sft_prompts * length / train + sampled + ranked / train
        if kind not in RUNS:
            return LOADING + measuring
        settings = read_config(str(config / f"{RUNS[kind][0]}.yaml"))
        # Of pretraining text per row.
        texts = (
            settings.get("ptx_batch_ratio", 0) * settings.get("ptx_max_length", 0) * (settings.get("ptx_coef", 0) > 0)
        )
        if RUNS[kind][1] == "beta":
            tokens = sizes.rm_prompts * 2 * length if kind == "dpo_best_worst" else ranked
            return 2 * LOADING + measuring + tokens * (1 / train + 1 / forward) + sizes.rm_prompts * texts / train
        minibatch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
        episodes = settings["max_steps"] * minibatch
        rollout = new / speeds["generation"] + length * 4 / forward + length * 2 / train
        return 2 * LOADING + measuring + episodes * (rollout + texts / train)

    # ---- what came of it ----------------------------------------------------------------------------------------
    def report(self) -> None:
        """frontier.json and frontier.html."""
        measured = {
            point: [Measured.of(read_jsonl(seed.rows_of(point))) for seed in self.seeds] for point in self.points
        }
        runs = {
            (point.method, point.knob): of_seeds for point, of_seeds in measured.items() if point.method != "best_of_n"
        }
        for point, of_seeds in measured.items():
            if point.method == "best_of_n":
                for n in self.args.best_of:
                    sfts = runs["sft", 0.0]
                    runs["best_of_n", n] = [m.best_of(n, sft) for m, sft in zip(of_seeds, sfts, strict=True)]
        results = results_of(runs, self.args.seeds)
        found = findings(runs)
        results |= {
            "findings": [asdict(finding) for finding in found],
            "settings": {"model": self.settings.model_name_or_path, **asdict(self.args)},
        }
        write_json(self.root / "frontier.json", results)
        build_frontier_page(self.root / "frontier.html", results, found)
        for finding in found:
            print(f"{finding.title}: {VERDICT[finding.holds]}")
        print(f"page: {self.root / 'frontier.html'}\nnumbers: {self.root / 'frontier.json'}")


def measured_speeds(
    model_name: str, size: int = 16, length: int = 32, drawn: int = 48, new: int = 12
) -> dict[str, float]:
    """Tokens a second of a LoRA model on this machine: training (forward and backward), forward, and generation."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    tokenizer = load_tokenizer(model_name)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    words = len(model.get_input_embeddings().weight)
    ids = torch.randint(words, (size, length), generator=torch.Generator().manual_seed(0))

    def rate(work: Callable[[], Any], tokens: int) -> float:
        work()
        start = time.perf_counter()
        work()
        return tokens / (time.perf_counter() - start)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)

    training = rate(lambda: model(input_ids=ids, labels=ids).loss.backward(), size * length)
    draw = partial(generate, model, tokenizer, ["It was"] * drawn, max_new_tokens=new, batch_size=drawn)
    return {
        "training": training,
        "forward": rate(forward, size * length),
        "generation": rate(draw, drawn * new),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the frontier."""
    argv = None if argv is None else list(argv)
    (args,) = parse((FrontierArguments,), argv, "prefopt frontier", __doc__)
    beside = config_folder(argv)
    path = args.pipeline or (beside / "pipeline.yaml" if beside else None)
    if path is None:
        raise UserError("pipeline is required: the settings of `prefopt pipeline` for a pretrained model")
    if unknown := sorted(set(args.methods) - {*RUNS, "best_of_n"}):
        raise UserError(f"methods: unknown {unknown[0]!r}; expected some of {', '.join([*RUNS, 'best_of_n'])}")
    if args.prompts not in ("tuning", "test"):
        raise UserError(f"prompts is {args.prompts!r}; expected tuning or test")
    keys = {field.name: getattr(args, field.name) for field in fields(RealTextArguments)}
    given = [
        text
        for key, value in keys.items()
        if value
        for text in (f"--{key}", *(value if isinstance(value, list) else [value]))
    ]
    (settings,) = parse((PipelineArguments,), ["--config", str(path), *given], "prefopt pipeline")
    if settings.model_name_or_path is None:
        raise UserError(f"pipeline: {path} names no model_name_or_path; the frontier is one of pretrained models")
    settings.config_dir = settings.config_dir or str(Path(path).parent)
    Frontier(args, settings).run()
