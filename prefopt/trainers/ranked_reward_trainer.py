"""`RankedRewardTrainer`: InstructGPT's reward model from rankings of K completions."""

import copy
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl import RewardTrainer

from prefopt.comparisons import RankedCollator, build_ids
from prefopt.losses import centring_loss, ranking_loss
from prefopt.shared_base import (
    get_reward_bias,
    init_score_head,
    keep_head_fp32,
    sequence_scores,
    set_reward_bias,
)
from prefopt.trainers.ranked import RankedTrainerMixin, pair_ratios
from prefopt.trainers.ranked_reward_config import RankedRewardConfig

logger = get_logger(__name__)


class RankedRewardTrainer(RankedTrainerMixin, RewardTrainer):
    """Train a reward model on ranked comparisons (InstructGPT, arXiv:2203.02155, section 3.5 and Eq. 1).

    Each completion is forwarded once and the C(K, 2) comparisons of a prompt are one batch element. Rows are
    `{"prompt", "completions", "ranks"}` or TRL preference rows; see `prefopt.comparisons`.

    Differences from `RewardTrainer`, whose arguments it takes:

    - The score is read at the last real token (found from the attention mask), by a head kept and computed in fp32.
    - A model given as a path whose checkpoint has no `score` head gets one drawn as `init_score_head` says.
    - A `peft_config` without `modules_to_save=["score"]` is completed with it; otherwise the head would be lost on
      saving.
    - Logged, under TRL's keys: `accuracy` and `margin` over the strict pairs of the logging window, `mean_reward`
      over its completions, `min_reward` and `max_reward` of a batch. `evaluate()` returns them with prefix `eval_`.
    - `compute_metrics` receives the scores `[N, K]` as predictions and the ranks `[N, K]` as labels; ranks below 1
      mark absent completions.

    Example:
        ```python
        trainer = RankedRewardTrainer(model="sft", args=RankedRewardConfig("rm"), train_dataset=comparisons)
        trainer.train()
        trainer.center_on(demonstrations)  # rows of prompt and completion
        trainer.save_model()
        prefopt.load_reward_model("rm")
        ```
    """

    _tag_names = ["trl", "prefopt", "reward-trainer", "ranked-reward"]  # noqa: RUF012 (TRL's attribute)
    _name = "Ranked Reward"
    _paper = {  # noqa: RUF012
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": textwrap.dedent("""\
            @inproceedings{ouyang2022training,
                title     = {{Training language models to follow instructions with human feedback}},
                author    = {Long Ouyang and Jeffrey Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and Pamela Mishkin and Chong Zhang and Sandhini Agarwal and Katarina Slama and Alex Ray and John Schulman and Jacob Hilton and Fraser Kelton and Luke Miller and Maddie Simens and Amanda Askell and Peter Welinder and Paul F. Christiano and Jan Leike and Ryan Lowe},
                year      = 2022,
                booktitle = {Advances in Neural Information Processing Systems 35 (NeurIPS 2022)},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RankedRewardConfig | None = None,
        data_collator: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            path = model if isinstance(model, str) else model.config.name_or_path
            args = RankedRewardConfig(f"{path.split('/')[-1] or 'model'}-RankedReward")
        if not isinstance(args, RankedRewardConfig):
            raise TypeError(f"`args` must be a RankedRewardConfig, got {type(args).__name__}")
        head_is_new = isinstance(model, str) and not _has_score_head(model, args)
        trained_head = None
        if isinstance(model, PeftModel):
            _require_trainable_head(model)
            trained_head = copy.deepcopy(model.get_base_model().score.state_dict())
        if peft_config is not None:
            peft_config = _with_score_head(peft_config)

        super().__init__(
            model=model, args=args, data_collator=data_collator, peft_config=peft_config, **kwargs
        )

        # On a quantised base TRL has cast every trainable weight to bf16 by now, the head's included.
        keep_head_fp32(self.model)
        if head_is_new:
            init_score_head(self.model)
        elif trained_head is not None:
            self.model.get_base_model().score.load_state_dict(trained_head)
        elif peft_config is not None:
            head = self.model.get_base_model().score
            head.modules_to_save.default.load_state_dict(head.original_module.state_dict())
        if data_collator is None:
            self.data_collator = RankedCollator(self.processing_class.pad_token_id, args.pad_to_multiple_of)

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        ranks = inputs["ranks"]
        present = ranks > 0
        flat = sequence_scores(model, inputs["input_ids"][present], inputs["attention_mask"][present])
        scores = flat.new_zeros(ranks.shape).masked_scatter(present, flat)

        loss = ranking_loss(scores, ranks)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * centring_loss(scores, ranks)

        self._count_tokens(inputs["attention_mask"])
        with torch.no_grad():
            pairs = pair_ratios(scores, ranks)
            self._add_ratios(
                {
                    "accuracy": pairs["accuracy"],
                    "margin": pairs["margin"],
                    "mean_reward": (scores.sum(1), present.sum(1)),
                }
            )
            lowest_and_highest = self.accelerator.gather(torch.stack([flat.min(), flat.max()]))
            self._metrics[self._mode]["min_reward"].append(lowest_and_highest.min().item())
            self._metrics[self._mode]["max_reward"].append(lowest_and_highest.max().item())
        return (loss, {"scores": scores}) if return_outputs else loss

    # ---- scoring ----

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """prefopt scores (bias subtracted) of completion i after prompt i, text or messages, in evaluation batches.

        Raises:
            ValueError: the two sequences differ in length.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions")
        rows = [
            list(chain(*build_ids(self.processing_class, prompt, completion)))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
        scores = [0.0] * len(rows)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(rows), self.args.eval_batch_size):
                batch = order[start : start + self.args.eval_batch_size]
                width = len(rows[batch[-1]])
                input_ids = torch.full((len(batch), width), self.processing_class.pad_token_id)
                attention_mask = torch.zeros_like(input_ids)
                for row, i in enumerate(batch):
                    input_ids[row, : len(rows[i])] = torch.tensor(rows[i])
                    attention_mask[row, : len(rows[i])] = 1
                device = self.accelerator.device
                with torch.no_grad():
                    values = sequence_scores(self.model, input_ids.to(device), attention_mask.to(device))
                for i, value in zip(batch, values.tolist(), strict=True):
                    scores[i] = value
        finally:
            self.model.train(was_training)
        return scores

    def center_on(self, demonstrations: Iterable[Mapping[str, Any]]) -> float:
        """Set the bias so that demonstrations score 0 on average (InstructGPT, section 3.5); returns the bias.

        Args:
            demonstrations: rows with `prompt` and `completion`.

        Raises:
            ValueError: there is no row.
        """
        rows = list(demonstrations)
        if not rows:
            raise ValueError("`center_on` needs at least one demonstration")
        scores = self.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
        set_reward_bias(self.model, get_reward_bias(self.model) + sum(scores) / len(scores))
        return get_reward_bias(self.model)

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):  # the adapter's directory carries the bias
            self.model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)


def _has_score_head(path: str, args: RankedRewardConfig) -> bool:
    kwargs = args.model_init_kwargs or {}
    if find_adapter_config_file(path, revision=kwargs.get("revision")) is not None:
        raise ValueError(
            f"{path} is an adapter: merge it into its base first (`merge_and_unload`, then save), or load it as a "
            "trainable PeftModel"
        )
    config = AutoConfig.from_pretrained(
        path, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
    )
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _with_score_head(peft_config: PeftConfig) -> PeftConfig:
    if peft_config.is_prompt_learning or not hasattr(peft_config, "modules_to_save"):
        raise ValueError(
            f"{type(peft_config).__name__} cannot keep a reward head; use an adapter on weights, such as LoraConfig"
        )
    if peft_config.task_type not in (None, "SEQ_CLS"):
        raise ValueError(f"a reward model needs task_type='SEQ_CLS', got {str(peft_config.task_type)!r}")
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    if "score" not in (peft_config.modules_to_save or []):
        logger.info("Adding 'score' to modules_to_save, so that the reward head is trained and saved.")
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), "score"]
    return peft_config


def _require_trainable_head(model: PeftModel) -> None:
    head = model.get_base_model().score
    if not (isinstance(head, ModulesToSaveWrapper) and any(p.requires_grad for p in head.parameters())):
        raise ValueError(
            "the PeftModel's `score` head is not trainable or would not be saved: make it with "
            "modules_to_save=['score'] and is_trainable=True, or pass `peft_config` instead"
        )
