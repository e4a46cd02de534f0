"""More of the reward that is trained on, less of what it stands for: told from evaluations, and a stop when it shows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState

from prefopt.errors import UserError
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig

logger = logging.getLogger(__name__)

FALL = 0.1  # standard deviations of a held-out score: its standard error on 100 episodes
PATIENCE = 3  # evaluations in a row


@dataclass(frozen=True)
class Evaluation:
    """A held-out score and the proxy that training maximizes, at one evaluation; the fall that counts as one."""

    step: int
    score: float
    proxy: float
    least_fall: float


def read_evaluation(
    entry: Mapping[str, Any], metric: str, proxy: str, least_fall: float | None = None
) -> list[Evaluation]:
    """The evaluation in a log entry, as a list of one; of none where a number is missing."""
    if least_fall is None:
        least_fall = FALL * (entry.get(metric.removesuffix("/mean") + "/std") or 0.0)
    if entry.get(metric) is None or entry.get(proxy) is None:
        return []
    return [Evaluation(int(entry.get("step", 0)), entry[metric], entry[proxy], least_fall)]


def evaluation_set(entry: Mapping[str, Any]) -> str:
    """Which evaluation set a log entry is of: Trainer's `eval_runtime`, or `eval_NAME_runtime` of several."""
    return next((key for key in entry if key.startswith("eval_") and key.endswith("_runtime")), "")


def overoptimized_since(evaluations: Sequence[Evaluation], patience: int) -> Evaluation | None:
    """The best evaluation, if the score fell and the proxy rose since it in each of the last `patience` ones.

    Goodhart's law as Gao et al. 2022 (arXiv:2210.10760) measure it: past a point, more of the proxy is less of what it
    stands for.

    Example:
        >>> log = [Evaluation(1, 0.2, 1.0, 0.1), Evaluation(2, 0.5, 2.0, 0.1), Evaluation(3, 0.3, 3.0, 0.1)]
        >>> overoptimized_since(log, patience=1).step
        2
        >>> overoptimized_since(log, patience=2) is None
        True
    """
    if len(evaluations) <= patience:
        return None
    best = max(evaluations, key=lambda evaluation: evaluation.score)
    fallen = [
        e.score < best.score - best.least_fall and e.proxy > best.proxy for e in evaluations[-patience:]
    ]
    return best if all(fallen) else None


def overoptimization_message(metric: str, evaluations: Sequence[Evaluation], best: Evaluation) -> str:
    """The trouble and its remedy in a sentence."""
    now = evaluations[-1]
    return (
        f"the held-out {metric} fell from {best.score:.3g} (step {best.step}) to {now.score:.3g} while the reward it is trained on "
        f"rose from {best.proxy:.3g} to {now.proxy:.3g}: the policy exploits the reward model; keep the checkpoint of "
        f"step {best.step}, raise kl_coef, or train the reward model on samples of this policy"
    )


class OveroptimizationStop(TrainerCallback):
    """Stops training when a held-out score falls while the proxy that is trained on rises.

    The held-out score is any number that evaluation logs and training does not see: a gold reward or human judgement
    as a reward function of weight 0 (`reward_weights=[1.0, 0.0]`), scored on the prompts of `eval_dataset`.

    Args:
        metric: log key of the held-out score. A reward function `gold` is `eval_rewards/gold/mean`; a second reward
            model is `eval_rewards/reward_model_2/mean`.
        proxy: log key of the reward that is trained on.
        patience: evaluations in a row below the best one, and with more of the proxy, before training stops.
        threshold: how far below the best counts, in units of the metric. Default: a tenth of its standard deviation
            over episodes, as logged.

    With several evaluation sets, one of them is enough to stop. A resumed run goes on from the evaluations in its log.

    Raises:
        ValueError: training without evaluation; an evaluation without `metric` or `proxy`.

    Example:
        >>> stop = OveroptimizationStop("eval_rewards/gold/mean", patience=2)
        >>> stop.patience
        2
    """

    def __init__(
        self,
        metric: str = "eval_rewards/gold/mean",
        proxy: str = "eval_rewards/reward_model/mean",
        patience: int = PATIENCE,
        threshold: float | None = None,
    ) -> None:
        if patience < 1:
            raise UserError(f"patience={patience}: expected at least 1 evaluation")
        self.metric, self.proxy, self.patience, self.threshold = metric, proxy, patience, threshold

    def on_train_begin(
        self, args: PPOPtxConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == IntervalStrategy.NO:
            raise UserError("OveroptimizationStop needs evaluations: set eval_strategy and eval_dataset")

    def on_evaluate(
        self,
        args: PPOPtxConfig,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        for key in (self.metric, self.proxy):
            if key not in metrics:
                known = ", ".join(sorted(k for k in metrics if k.endswith("/mean") and "rewards/" in k))
                raise UserError(f"OveroptimizationStop: no {key!r} among the metrics of evaluation ({known})")
        evaluations = [
            evaluation
            for entry in state.log_history
            if evaluation_set(entry) == evaluation_set(metrics)
            for evaluation in read_evaluation(entry, self.metric, self.proxy, self.threshold)
        ]
        best = overoptimized_since(evaluations, self.patience)
        if best is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                message = overoptimization_message(self.metric, evaluations, best)
                logger.warning("step %d: training stops: %s", state.global_step, message)
