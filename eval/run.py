"""What every stage of an evaluation shares: its arguments, the folder it reads and writes, and what a stage is."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prefopt.errors import UserError
from prefopt.evaluation.results import Measures, jsonable
from prefopt.inference.engines import HELP, check_engine
from prefopt.inference.jsonl import read_json, read_jsonl, unique_keys, write_whole

logger = logging.getLogger(__name__)


# What a row of completions has, but for the prompt's own columns.
COMPLETION = {
    "id": int,
    "prompt": str | list,
    "decoding": str,
    "sample": int,
    "completion": str,
    "ids": list,
    "truncated": bool,
}


class Question(NamedTuple):
    """A row of the report's lights: the measures (a pattern) whose comparison with the baseline answers it.

    `{}` in the title is what is compared with; `paper`: what the paper found.
    """

    title: str
    measure: str
    decimals: int = 3
    paper: str = ""


@dataclass(frozen=True)
class Stage:
    """One step of an evaluation, all of it in one file of `stages/`; `prefopt.evaluation.stages.STAGES` is their list.

    Args:
        name: as on the command line.
        answers: what `prefopt eval --help` says of it.
        arguments: dataclass of its own keys.
        measure: called with the `EvaluationRun`, `EvaluationArguments`, its own arguments and those that it `reads`.
        measures: the numbers it gives, each with its definition.
        of_completions: whether it looks at completions: what it found no longer holds when these are drawn anew.
        reads: dataclasses of other stages whose keys it needs too.
        questions: that its measures answer in the report.
        title: of its section in the report, if it has one.
        section: gives the section's blocks (`report.tables`) from the results.
        headlines: the measures (patterns) that the command prints when the stage has run by itself; default: those of
            `questions`.
    """

    name: str
    answers: str
    arguments: type
    measure: Callable[..., Any]
    measures: Measures = field(default_factory=Measures)
    of_completions: bool = False
    reads: tuple[type, ...] = ()
    questions: tuple[Question, ...] = ()
    title: str = ""
    section: Callable[..., list[Any]] | None = None
    headlines: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in files and in results.json."""
        return self.name.replace("-", "_")


@dataclass
class EvaluationArguments:
    """What all stages need to know. Each has a dataclass of its own besides, whose keys stand in the same file."""

    LEAST: ClassVar[dict[str, float]] = {"batch_size": 1, "seed": 0}

    output_dir: str = field(metadata={"help": "Folder of the evaluation; every stage reads and writes there."})
    # With `| None` in this place the command line passes on the text as it is, and __post_init__ reads the JSON in it.
    models: dict[str, str] | str | None = field(
        default_factory=dict,
        metadata={"help": "Name of each model and its folder or Hub id; on the command line as JSON."},
    )
    baseline: str = field(default="sft", metadata={"help": "The model that win rates and KL compare with."})
    base: str | None = field(
        default=None,
        metadata={"help": "The model whose benchmark results the alignment tax is measured from; default: baseline."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the weights of whole models to nf4."})
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "auto (as saved; of a reward model, as trained), float32, bfloat16 or float16.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Sequences per forward."})
    seed: int = field(default=0, metadata={"help": "Of sampling, of judges' orders and of the intervals."})
    engine: str = field(default="transformers", metadata={"help": HELP})

    heldout_use_case: str | None = field(
        default=None,
        metadata={"help": "Use case kept out of training: its prompts are reported apart and in no other number."},
    )

    def __post_init__(self) -> None:
        self.models = parsed_mapping("models", self.models)
        check_names("models", self.models)
        for name, source in self.models.items():
            if not isinstance(source, str) or not source:
                raise UserError(f"models: {name}: expected a folder or Hub id, got {source!r}")
        check_engine(self.engine)
        if Path(self.output_dir).is_file():
            raise UserError(f"output_dir: {self.output_dir!r} is a file; expected a folder")

    @property
    def loading(self) -> dict[str, Any]:
        """How models are loaded: arguments of `load_language_model` and `load_classifier`."""
        return {"load_in_4bit": self.load_in_4bit, "dtype": self.dtype}

    @property
    def tax_base(self) -> str | None:
        """The model that the alignment tax is measured from, if it is one of `models`."""
        return self.base or (self.baseline if self.baseline in self.models else None)


def check_baseline(stages: Mapping[str, Mapping[str, Any]], args: EvaluationArguments) -> None:
    """Raise unless what the stages found (the `data` of each) is relative to the baseline and the base of now.

    >>> check_baseline({"drift": {"baseline": "sft"}}, EvaluationArguments("out", {"dpo": "b"}, baseline="dpo"))
    Traceback (most recent call last):
    prefopt.errors.UserError: baseline is 'dpo', but drift measured against 'sft'; run it again, or `prefopt eval all`
    """
    for key, now in (("baseline", args.baseline), ("base", args.tax_base)):
        other = {name: data[key] for name, data in stages.items() if data.get(key) not in (None, now)}
        if other:
            told = ", ".join(f"{name} measured against {model!r}" for name, model in other.items())
            them = "it" if len(other) == 1 else "them"
            raise UserError(f"{key} is {now!r}, but {told}; run {them} again, or `prefopt eval all`")


def check_names(key: str, names: Iterable[Any]) -> None:
    """Raise unless the names can be those of files."""
    for name in names:
        if not re.fullmatch(r"\w[\w .+-]*", str(name)):
            raise UserError(
                f"{key}: the name {name!r} becomes a file's; expected letters, digits, spaces and _ . + - only"
            )


def parsed_mapping(key: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A mapping from YAML as it is, one from the command line from its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=unique_keys)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UserError(f'{key}: expected JSON like {{"name": ...}}, got {value!r:.80} ({reason})') from error
    if not isinstance(value or {}, dict):
        raise UserError(f"{key}: expected `name: ...` pairs, got {value!r}")
    return dict(value or {})


def named_rows(key: str, path: str) -> list[dict[str, Any]]:
    """Rows of the JSONL file that an argument names."""
    if not Path(path).is_file():
        raise UserError(f"{key}: no file {path!r}")
    return read_jsonl(path)


def headline(m: Mapping[str, Any]) -> str:
    """A measure with a value in one line.

    >>> known = {"name": "winrate", "model": "dpo", "against": "sft", "value": 0.6, "ci_low": 0.5, "ci_high": 0.7}
    >>> headline({**known, "n": 40, "n_clusters": 40}), headline({**known, "n": 90, "n_clusters": 40})
    ('winrate of dpo against sft: 0.6 [0.5, 0.7] (n = 40)', 'winrate of dpo against sft: 0.6 [0.5, 0.7] (n = 90 in 40 prompts)')
    """
    against = f" against {m['against']}" if m["against"] else ""
    interval = "" if m["ci_low"] is None else f" [{m['ci_low']:.4g}, {m['ci_high']:.4g}]"
    clusters = f" in {m['n_clusters']} prompts" if m["n_clusters"] != m["n"] else ""
    return f"{m['name']} of {m['model']}{against}: {m['value']:.4g}{interval} (n = {m['n']}{clusters})"


@dataclass(frozen=True)
class EvaluationRun:
    """`completions/<model>.jsonl` from `generate`, `stages/<stage>.json` from every other stage.

    A row of completions: `id` (number of the prompt), `prompt`, the prompt's own columns (`use_case`, ...),
    `decoding` ("sampled" or "greedy"), `sample` (0, 1, ... of a prompt), `completion`, `ids`, `truncated`.

    `contrasts`: pairs of models whose paired difference is measured besides those to the baseline; `progress` is called
    with a line of text when a part begins.
    """

    folder: Path
    contrasts: Sequence[tuple[str, str]] = (("ppo_ptx", "ppo"),)
    progress: Callable[[str], None] = logger.info

    def compared(self, models: Iterable[str], baseline: str) -> list[tuple[str, str]]:
        """Pairs of the models whose paired difference is measured: each with the baseline, and the contrasts.

        >>> EvaluationRun(Path("out")).compared(["sft", "ppo", "ppo_ptx"], "sft")
        [('ppo', 'sft'), ('ppo_ptx', 'sft'), ('ppo_ptx', 'ppo')]
        """
        known = list(models)
        pairs = [(model, baseline) for model in known if model != baseline and baseline in known]
        return list(dict.fromkeys([*pairs, *(pair for pair in self.contrasts if set(pair) <= set(known))]))

    def completions_path(self, model: str) -> Path:
        return self.folder / "completions" / f"{model}.jsonl"

    def has_completions(self, model: str) -> bool:
        return self.completions_path(model).is_file()

    def completions(self, model: str, decoding: str = "sampled") -> list[dict[str, Any]]:
        """Rows of a model, by prompt and sample.

        Raises:
            FileNotFoundError: nothing was generated for the model.
        """
        path = self.completions_path(model)
        if not self.has_completions(model):
            raise FileNotFoundError(f"no completions of {model!r} at {path}; run `prefopt eval generate` first")
        rows = read_jsonl(path)
        for number, row in enumerate(rows):
            if not all(isinstance(row.get(name), kind) for name, kind in COMPLETION.items()):
                raise UserError(f"{path} row {number}: not what `prefopt eval generate` writes; run that again")
        rows = [row for row in rows if row["decoding"] == decoding]
        return sorted(rows, key=lambda row: (row["id"], row["sample"]))

    def first_samples(self, model: str) -> list[dict[str, Any]]:
        """The first sample of every prompt; none where nothing was generated."""
        rows = self.completions(model) if self.has_completions(model) else []
        return [row for row in rows if row["sample"] == 0]

    def measured_samples(self, model: str, heldout_use_case: str | None) -> list[dict[str, Any]]:
        """All samples but those of the use case kept out of training, which is in no number.

        Raises:
            FileNotFoundError: there are none.
        """
        rows = [r for r in self.completions(model) if not heldout_use_case or r.get("use_case") != heldout_use_case]
        if not rows:
            raise FileNotFoundError(f"no samples of {model!r}; run `prefopt eval generate` first")
        return rows

    def headlines(self, stage: Stage) -> list[str]:
        """What a stage found, in lines: its most important measures that have a value."""
        patterns = stage.headlines or tuple(question.measure for question in stage.questions)
        found = (self.stage(stage.key) or {"measures": []})["measures"]
        return [
            headline(m)
            for pattern in patterns
            for m in found
            if m["value"] is not None and fnmatchcase(m["name"], pattern)
        ]

    def write_stage(
        self, stage: Stage, measures: Sequence[Mapping[str, Any]], data: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what a stage found: its measures (`Measures.record`) and what its plots and tables need besides."""
        content = {
            "measures": list(measures),
            "data": dict(data or {}),
            "completions": self._completions_state() if stage.of_completions else None,
        }
        text = json.dumps(jsonable(content), ensure_ascii=False, indent=1, allow_nan=False)
        write_whole(self.stage_path(stage.key), text + "\n")

    def stage(self, stage: str) -> dict[str, Any] | None:
        """What `write_stage` kept, or None if the stage has not run, or not on the completions that are there now."""
        if self.is_stale(stage):
            path = self.stage_path(stage)
            logger.warning("%s is of other completions than those there now: run the stage again", path)
            return None
        return self._kept(stage)

    def is_stale(self, stage: str) -> bool:
        """Whether a stage has run on other completions than those there now."""
        known = (self._kept(stage) or {"completions": None})["completions"]
        return known is not None and known != self._completions_state()

    def _kept(self, stage: str) -> dict[str, Any] | None:
        path = self.stage_path(stage)
        if not path.is_file():
            return None
        content = {"completions": None, **read_json(path, "measures", "data")}
        measures = content["measures"]
        is_list = isinstance(measures, list) and all(isinstance(m, dict) and "name" in m for m in measures)
        if not is_list or not isinstance(content["data"], dict):
            raise UserError(f"{path}: not what `prefopt eval {stage}` writes; run that again")
        return content

    def forget_stage(self, stage: str) -> None:
        """Delete what an earlier run of the stage kept, because it no longer holds."""
        self.stage_path(stage).unlink(missing_ok=True)

    def _completions_state(self) -> list[list[str]]:
        """Names and contents of all completions, in short."""
        files = sorted((self.folder / "completions").glob("*.jsonl"))
        return [[file.stem, hashlib.sha256(file.read_bytes()).hexdigest()[:16]] for file in files]

    def stage_path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage.replace('-', '_')}.json"
