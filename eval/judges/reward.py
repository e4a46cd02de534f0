"""A reward model as the judge: the completion with the higher score is preferred."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from prefopt.evaluation.judges.people import Row
from prefopt.evaluation.run import EvaluationArguments
from prefopt.inference.generate import Completion
from prefopt.inference.scoring import score_samples
from prefopt.models.checkpoints import load_classifier
from prefopt.models.loading import known_tokenizer
from prefopt.rankings.tokens import template_kwargs


class RewardModel:
    """Scores completions; loaded when it is first needed.

    Scores are of the ids as they were sampled where the policy has the reward model's tokens, else of the text.

    Args:
        source: its folder or Hub id.
        progress: called with a line of text before it is loaded.
    """

    def __init__(self, source: str, args: EvaluationArguments, progress: Callable[[str], None]) -> None:
        self.source, self.args, self.progress = source, args, progress

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        self.progress(f"loading reward model {self.source}")
        return load_classifier(self.source, **self.args.loading)

    def scores(self, model: str, rows: Sequence[Row]) -> list[float]:
        """One for each row of the completions of `model`."""
        samples = [Completion(row["completion"], row["ids"], row["truncated"]) for row in rows]
        policy = known_tokenizer(self.args.models[model])
        prompts, of_rows = [row["prompt"] for row in rows], [template_kwargs(row) for row in rows]
        return score_samples(*self.loaded, policy, prompts, samples, self.args.batch_size, of_rows)
