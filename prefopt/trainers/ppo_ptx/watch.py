"""What goes wrong in PPO training, seen in its log: every trouble once, with its remedy; and a stop on overoptimization."""

import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from prefopt.errors import UserError
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig

logger = logging.getLogger(__name__)

# Where training counts as gone wrong. The runs of the sandbox (PPO and PPO-ptx, four seeds) stay well inside each.
# Log entries that are averaged: one noisy entry is no trouble.
WINDOW = 5
# Nats: sampled tokens e^2 = 7 times as probable as under the reference; sandbox PPO ends near 1.
KL_PER_TOKEN = 2.0
# Share of the entropy at the start; the sandbox ends at .35 to .6.
ENTROPY_LEFT = 0.1
# Errors with 1.3 times the variance of the returns, where a constant value gets 0.
EXPLAINED_VARIANCE = -0.3
# Log entries before that counts: a copy of the reward model whose head was not fitted starts there.
LEARNING_TO_VALUE = 20
# By so much more in the last WINDOW entries than in those before, it is on its way.
IMPROVING = 0.1
# Times the lowest value loss so far.
VALUE_LOSS_GROWTH = 10.0
# Of two norms: the smaller term turns the sum by at most asin(1 / 10), 6 degrees.
GRADIENT_RATIO = 10.0
# Share of tokens whose ratio is clipped: their gradient is 0; the sandbox stays below .03.
CLIPPED = 0.3
# Share of episodes: lost work, and if the unscored ones are alike, a bias.
UNSCORED = 0.1
# Share of episodes.
WITHOUT_EOS = 0.9
# Standard deviations of a held-out score: its standard error on 100 episodes.
FALL = 0.1
# Evaluations in a row.
PATIENCE = 3


@dataclass(frozen=True)
class Trouble:
    """Something that goes wrong in a run: its name, the step and the log key it was seen at, and what to do."""

    name: str
    step: int
    key: str
    message: str


def diagnose(history: Sequence[Mapping[str, Any]], settings: Mapping[str, float] | None = None) -> list[Trouble]:
    """The troubles of a run of PPOPtxTrainer, each at the step where its log first showed it.

    Args:
        history: `trainer.state.log_history`, or `log_history` of trainer_state.json. A key that is missing, or None,
            leaves out what depends on it.
        settings: `TrainingWatch.settings`, which trainer_state.json keeps. Of these, `episodes_per_rollout` gives the
            share of unscored episodes, and `normalize_scores` the unit of the scores.

    Example:
        >>> log = [{"step": s, "entropy": 2.0 * 0.8**s} for s in range(20)]
        >>> [(trouble.name, trouble.step) for trouble in diagnose(log)]
        [('entropy collapse', 15)]
    """
    diagnosis = Diagnosis(settings)
    return [trouble for entry in history for trouble in diagnosis.add(entry)]


class Diagnosis:
    """`diagnose`, one log entry after the other."""

    def __init__(self, settings: Mapping[str, float] | None = None) -> None:
        settings = settings or {}
        self.episodes = settings.get("episodes_per_rollout")
        self.is_normalized = bool(settings.get("normalize_scores"))
        self._reported: set[str] = set()
        self._last: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._first: dict[str, list[float]] = defaultdict(list)
        self._values_seen = 0
        self._explained: deque[float] = deque(maxlen=2 * WINDOW)
        self._lowest_value_loss = math.inf
        self._evaluations: dict[tuple[str, str], list[Evaluation]] = defaultdict(list)

    def add(self, entry: Mapping[str, Any]) -> list[Trouble]:
        """The troubles that this entry shows and no earlier one did."""
        for key, value in entry.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._last[key].append(float(value))
                if len(self._first[key]) < WINDOW:
                    self._first[key].append(float(value))
        checks = [
            self._not_finite(entry),
            self._kl_runaway(),
            self._entropy_collapse(),
            self._value_divergence(entry),
            self._unbalanced_gradients(),
            self._equal_rewards(),
            self._unscored(),
            self._without_eos(),
            self._clipped(),
            *self._over_optimization(entry),
        ]
        troubles = []
        for name, key, message in filter(None, checks):
            if name not in self._reported:
                self._reported.add(name)
                troubles.append(Trouble(name, int(entry.get("step", 0)), key, message))
        return troubles

    def _now(self, key: str) -> float | None:
        """Mean of the last `WINDOW` values under `key`; None before there are so many."""
        return fmean(self._last[key]) if len(self._last[key]) == WINDOW else None

    def _start(self, key: str) -> float:
        return fmean(self._first[key])

    # ---- the troubles: (name, key, message) or None -----------------------------------------------------------
    def _not_finite(self, entry: Mapping[str, Any]) -> tuple[str, str, str] | None:
        for key, value in entry.items():
            if key.startswith(("loss", "grad_norm")) and (value is None or not math.isfinite(value)):
                return (
                    "not finite",
                    key,
                    f"the value of {key} is not a finite number, and the weights may not be either: go back to the last good "
                    "checkpoint with a lower learning_rate, and look for rewards or inputs that are NaN or infinite",
                )
        return None

    def _kl_runaway(self) -> tuple[str, str, str] | None:
        kl, length = self._now("objective/kl"), self._now("completions/mean_length")
        if kl is not None and length and kl / length > KL_PER_TOKEN:
            return (
                "KL runaway",
                "objective/kl",
                f"the policy is {kl / length:.1f} nats per token from the reference (above {KL_PER_TOKEN:g}): its text "
                "is no longer what the reward model was trained on; raise kl_coef, lower learning_rate, or go back to "
                "an earlier checkpoint",
            )
        reward, spread = self._now("reward"), self._now("reward_std")
        scores, rewards = self._now("objective/scores"), self._now("objective/rewards")
        if None in (reward, spread, scores, rewards) or self._rewards_are_equal():
            return None
        spread = max(spread, self._start("reward_std"))
        cost, gain = scores - rewards, reward - self._start("reward")
        if self.is_normalized:
            gain, spread = gain / spread, 1.0
        if cost > max(gain, 0) + spread:
            return (
                "KL runaway",
                "objective/kl",
                f"the KL penalty ({cost:.2g} per episode) costs more than the score has gained ({gain:+.2g}), by more "
                "than one standard deviation of the score: the policy drifts without learning; lower learning_rate or "
                "num_iterations, and check that the reward tells good answers from bad ones",
            )
        return None

    def _entropy_collapse(self) -> tuple[str, str, str] | None:
        now = self._now("entropy")
        if now is None or not now < ENTROPY_LEFT * self._start("entropy"):
            return None
        return (
            "entropy collapse",
            "entropy",
            f"the entropy per token fell from {self._start('entropy'):.2g} to {now:.2g} (below {_percent(ENTROPY_LEFT)} of "
            "the start): samples of a prompt are nearly the same, and PPO learns from their differences; raise kl_coef "
            "or lower learning_rate, and read samples for text that exploits the reward",
        )

    def _value_divergence(self, entry: Mapping[str, Any]) -> tuple[str, str, str] | None:
        loss, explained = self._now("loss/value"), self._now("value/explained_variance")
        if loss is not None:
            self._lowest_value_loss = min(self._lowest_value_loss, loss)
        if entry.get("value/explained_variance") is not None:
            self._values_seen += 1
            self._explained.append(entry["value/explained_variance"])
        if explained is None:
            return None
        improves = explained > fmean(list(self._explained)[:WINDOW]) + IMPROVING
        grown = loss is not None and loss > VALUE_LOSS_GROWTH * self._lowest_value_loss and explained < 0
        is_early = improves or self._values_seen < LEARNING_TO_VALUE
        if not grown and (explained > EXPLAINED_VARIANCE or is_early):
            return None
        seen, remedy = f"explained variance {explained:.2g}", "raise value_learning_rate (an adapter's: to about 5e-4)"
        if grown:
            seen += f", value loss {loss:.2g} after {self._lowest_value_loss:.2g}"
            remedy = "lower value_learning_rate"
        return (
            "value divergence",
            "value/explained_variance",
            f"the value function is worse than a constant ({seen}), so the advantages are noise: {remedy}, start it "
            "from the reward model that gives the scores with its head fitted to the first rollout (fit_value_head), or "
            "let it learn alone for some value_warmup_steps",
        )

    def _unbalanced_gradients(self) -> tuple[str, str, str] | None:
        ppo, ptx = self._now("grad_norm/ppo"), self._now("grad_norm/ptx")
        # 0 while the policy does not move yet.
        if not ppo or not ptx or not min(self._last["grad_norm/ppo"]) > 0:
            return None
        if ptx > GRADIENT_RATIO * ppo:
            return (
                "ptx drowns PPO",
                "grad_norm/ptx",
                f"the pretraining gradient is {ptx / ppo:.0f} times PPO's (norms {ptx:.2g} and {ppo:.2g}): the policy "
                "hardly follows the reward; lower ptx_coef",
            )
        if ppo > GRADIENT_RATIO * ptx:
            return (
                "PPO drowns ptx",
                "grad_norm/ptx",
                f"PPO's gradient is {ppo / ptx:.0f} times the pretraining one (norms {ppo:.2g} and {ptx:.2g}): ptx "
                "hardly protects what pretraining taught; raise ptx_coef, or set it to 0 and save its time",
            )
        return None

    def _rewards_are_equal(self) -> bool:
        if self._now("reward") is None or self._now("reward_std") is None:
            return False
        level = max(map(abs, self._last["reward"]))
        # The rounding of a mean in fp32.
        return max(self._last["reward_std"]) <= 1e-5 * max(1.0, level)

    def _equal_rewards(self) -> tuple[str, str, str] | None:
        if not self._rewards_are_equal():
            return None
        return (
            "equal rewards",
            "reward_std",
            f"every episode gets the same reward ({self._now('reward'):.3g}): there is nothing to learn from; check the reward "
            "model (was its head saved?), the reward function, and clipping of rewards",
        )

    def _unscored(self) -> tuple[str, str, str] | None:
        unscored = self._now("objective/unscored")
        if not self.episodes or unscored is None or not unscored > UNSCORED * self.episodes:
            return None
        return (
            "unscored episodes",
            "objective/unscored",
            f"{_percent(unscored / self.episodes)} of the episodes got no usable reward (None, NaN or infinite) and are in "
            "no loss: make the reward functions return a number for them, or take out the prompts they cannot judge",
        )

    def _without_eos(self) -> tuple[str, str, str] | None:
        share = self._now("completions/clipped_ratio")
        if share is None or not share > WITHOUT_EOS:
            return None
        return (
            "no EOS",
            "completions/clipped_ratio",
            f"{_percent(share)} of the completions run into the length limit without EOS: the reward sees cut-off text; "
            "raise max_completion_length, set missing_eos_penalty, or check that the SFT model learned to end",
        )

    def _clipped(self) -> tuple[str, str, str] | None:
        share = self._now("clip_ratio/region_mean")
        if share is None or not share > CLIPPED:
            return None
        return (
            "clipping",
            "clip_ratio/region_mean",
            f"the ratio of {_percent(share)} of the tokens is clipped, which takes them out of the gradient: one rollout "
            "moves the policy too far; lower learning_rate or num_iterations, or make minibatches larger",
        )

    def _over_optimization(self, entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        troubles = []
        for key in entry:
            if key.startswith("eval_rewards/") and key.endswith("/mean"):
                evaluations = self._evaluations[key, evaluation_set(entry)]
                evaluations.extend(read_evaluation(entry, key, "eval_reward"))
                best = overoptimized_since(evaluations, PATIENCE)
                if best is not None:
                    message = overoptimization_message(key, evaluations, best)
                    troubles.append(("over-optimization", key, message))
        return troubles


class TrainingWatch(TrainerCallback, ExportableState):
    """Warns, once each, of the troubles that `diagnose` sees in the log; PPOPtxTrainer adds it by itself.

    trainer_state.json keeps `settings`, for whoever reads the log later.
    """

    def __init__(self) -> None:
        self.settings: dict[str, float] = {}
        self._diagnosis = Diagnosis()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"settings": self.settings}}

    def on_train_begin(self, args: PPOPtxConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.settings = {
            "episodes_per_rollout": args.generation_batch_size,
            "max_grad_norm": args.max_grad_norm,
            "kl_coef": args.kl_coef,
            "ptx_coef": args.ptx_coef,
            "vf_coef": args.vf_coef,
            "normalize_scores": args.normalize_scores,
        }
        state.stateful_callbacks["TrainingWatch"] = self.state()
        self._diagnosis = Diagnosis(self.settings)
        # Of the run that this one resumes: warned of before.
        for entry in state.log_history:
            self._diagnosis.add(entry)

    def on_log(self, args: PPOPtxConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            for trouble in self._diagnosis.add(state.log_history[-1]):
                logger.warning("step %d: %s: %s", trouble.step, trouble.name, trouble.message)


# ---- more of the reward that is trained on, less of what it stands for ------------------------------------------
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
    fallen = [e.score < best.score - best.least_fall and e.proxy > best.proxy for e in evaluations[-patience:]]
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

    def on_train_begin(self, args: PPOPtxConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
