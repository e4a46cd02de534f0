"""Where the time of PPO-ptx goes: seconds of the parts of its steps."""

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import TrainerCallback

from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer


class Phases(TrainerCallback):
    """Takes the time of a trainer's parts from now on.

    Args:
        trainer: with pretraining text.
        now: a clock; on a GPU one that first waits for what it was told to do, without which a part would be charged for
            the part before.

    Attributes:
        seconds: so far, by part; parts lie within others (`by_phase`).
    """

    METHODS = (
        ("generation", "_generate"),
        ("scores", "_calculate_rewards"),
        ("rollout", "_generate_and_score_completions"),
        ("step", "training_step"),
    )

    def __init__(self, trainer: PPOPtxTrainer, now: Callable[[], float]) -> None:
        self.now, self.seconds, self._since = now, defaultdict(float), 0.0
        for part, method in self.METHODS:
            setattr(trainer, method, self._timed(part, getattr(trainer, method)))
        trainer.pretraining.add_to_gradient = self._timed("text", trainer.pretraining.add_to_gradient)
        trainer.add_callback(self)

    def _timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - start

        return timed

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._since = self.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds["optimizer"] += self.now() - self._since

    def by_phase(self) -> dict[str, float]:
        """Parts that do not overlap, in their order."""
        found = self.seconds
        return {
            "generation": found["generation"],
            "scores": found["scores"],
            "log-probabilities, values": found["rollout"] - found["generation"] - found["scores"],
            "policy and value": found["step"] - found["rollout"] - found["text"],
            "text": found["text"],
            "optimizer": found["optimizer"],
        }
