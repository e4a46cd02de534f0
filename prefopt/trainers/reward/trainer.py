"""`RankedRewardTrainer`: InstructGPT's reward model from rankings of K completions."""

from prefopt.trainers.shared.trl_contract import require_seams

# Before anything of TRL's inside is imported, so that a name that has moved is refused in a sentence.
require_seams("RankedRewardTrainer")

# isort: split
import copy
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import find_adapter_config_file
from trl import RewardTrainer
from trl.trainer.utils import create_model_from_path

from prefopt.errors import UserError, UserTypeError
from prefopt.losses import centering_loss, ranking_loss, rating_margins
from prefopt.models.checkpoints import (
    head_comes_later,
    head_loaded_in_fp32,
    keep_logit_plain,
    keep_pad_from_eos,
    save_config_beside,
)
from prefopt.models.loading import saved_config, saved_pad_token
from prefopt.models.passes import check_rows, stop_randomness
from prefopt.models.reward import (
    add_reward_token,
    append_reward_token,
    get_reward_bias,
    init_score_head,
    keep_4bit_gradients,
    keep_head_fp32,
    read_scores,
    set_reward_bias,
    train_reward_token,
)
from prefopt.rankings.checks import validate_demonstrations
from prefopt.rankings.dataset import ComparisonStream, RankedCollator
from prefopt.trainers.ranked.base import RankedTrainer, Ratio
from prefopt.trainers.ranked.options import check_arguments, check_model
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.shared.precision import refuse_several_devices, trainable_weights, undo_rounding

logger = get_logger(__name__)


class RankedRewardTrainer(RankedTrainer, RewardTrainer):
    """A reward model is trained on ranked comparisons (InstructGPT, arXiv:2203.02155, section 3.5 and Eq. 1).

    Each completion is forwarded once and the C(K, 2) comparisons of a prompt are one batch element. Rows are
    `{"prompt", "completions", "ranks"}` or TRL preference rows; see `prefopt.rankings.dataset`.

    Differences from `RewardTrainer`, whose arguments it takes:

    - The score is read at the last real token (found from the attention mask), or with `args.reward_token` at that
      token, appended to every completion; by a head kept and computed in fp32.
    - A model given as a path whose checkpoint has no `score` head gets one drawn as `init_score_head` says.
    - A `peft_config` without `modules_to_save=["score"]` is completed with it; otherwise the head would be lost on
      saving.
    - On a quantized base the trainable weights are fp32, not TRL's bf16: bf16 swallows small updates, and PEFT loads
      adapters in fp32, so that the saved model would score differently from the trained one.
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
    _name = "ranked reward modeling"
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
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        check_arguments(RankedRewardTrainer, RewardTrainer, RankedRewardConfig, kwargs)
        kwargs |= {
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_model(model, processing_class)
        if args is None:
            path = model if isinstance(model, str) else model.config.name_or_path
            args = RankedRewardConfig(f"{path.split('/')[-1] or 'model'}-RankedReward")
        if not isinstance(args, RankedRewardConfig):
            raise UserTypeError(f"`args` must be a RankedRewardConfig, got {type(args).__name__}")
        head_is_new = isinstance(model, str) and not _has_score_head(model, args)
        if isinstance(model, PeftModel):
            _require_trainable_head(model)
        given = trainable_weights(model)
        if peft_config is not None:
            peft_config = _with_score_head(peft_config)
        self._reward_token_id = _reward_token_id(model, args)
        path, init_kwargs = model, args.model_init_kwargs
        if args.reward_token is not None:
            model = self._read_at_reward_token(model, args, peft_config, kwargs)

        with head_loaded_in_fp32(), head_comes_later() if head_is_new else nullcontext():
            super().__init__(model=model, args=args, data_collator=data_collator, peft_config=peft_config, **kwargs)
        args.model_init_kwargs = init_kwargs
        refuse_several_devices(self.model)

        keep_4bit_gradients(self.model)
        undo_rounding(self.model, given)
        check_rows(self.model)
        if args.disable_dropout:
            stop_randomness(self.model)
        keep_head_fp32(self.model)
        if head_is_new:
            init_score_head(self.model)
            if args.reward_token is None:
                # The base may be a policy that must not sample another model's token.
                self.model.config.reward_token_id = None
        elif peft_config is not None:
            head = self.model.get_base_model().score
            head.modules_to_save.default.load_state_dict(head.original_module.state_dict())
        if isinstance(path, str) and not head_is_new:
            # Read as it was trained. TRL has given its config the tokenizer's pad token.
            pad, ends = saved_pad_token(path, self.model.config, **_revision(args))
            self.model.config.unread_token_id = pad if ends else None
        else:
            # Read at the last token, unless it was loaded from where another trainer left it.
            self.model.config.unread_token_id = getattr(self.model.config, "unread_token_id", None)
        if data_collator is None:
            self.data_collator = RankedCollator(self.processing_class.pad_token_id, args.pad_to_multiple_of)

    def _read_at_reward_token(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RankedRewardConfig,
        peft_config: PeftConfig | None,
        kwargs: dict[str, Any],
    ) -> PreTrainedModel | PeftModel:
        """Add the reward token to (a copy of) the tokenizer and to the model, before adapters are put on it."""
        tokenizer = copy.deepcopy(kwargs.get("processing_class"))
        if tokenizer is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )
        kwargs["processing_class"] = tokenizer
        if isinstance(model, str):
            # TRL would load it, but puts the adapter on it at once, and the embeddings may have to grow before.
            init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            args.model_init_kwargs = None
            if quantization := kwargs.pop("quantization_config", None):
                init_kwargs["quantization_config"] = quantization
            if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init_kwargs["device_map"] = None
            set_seed(args.seed)
            with head_loaded_in_fp32(), head_comes_later():
                model = create_model_from_path(model, AutoModelForSequenceClassification, num_labels=1, **init_kwargs)
        if isinstance(model, PeftModel):
            if getattr(model.config, "reward_token_id", None) is None:
                raise UserError(
                    f"reward_token={args.reward_token!r}: the given adapter does not train the token's embedding; merge it "
                    "into its base (`merge_and_unload`) and pass `peft_config`, or make it with "
                    "`prefopt.models.checkpoints.reward_model_from_adapter`"
                )
            self._reward_token_id = add_reward_token(model.get_base_model(), tokenizer, args.reward_token)
        else:
            self._reward_token_id = add_reward_token(model, tokenizer, args.reward_token)
            if peft_config is not None:
                train_reward_token(peft_config, model)
        return model

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RankedRewardConfig,
        dataset_name: str,
    ) -> Dataset | ComparisonStream:
        if self._reward_token_id is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is not None:
            # The reward token comes on top.
            args = copy.copy(args)
            args.max_length -= 1
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        token = args.reward_token or processing_class.convert_ids_to_tokens(self._reward_token_id)

        def problem(row: Mapping[str, Any]) -> str | None:
            if any(self._reward_token_id in ids for ids in (row["prompt_ids"], *row["completion_ids"])):
                return f"its text contains the reward token {token!r}; take a token that no text has"
            return None

        if isinstance(dataset, ComparisonStream):
            dataset.checks.append(problem)
            return dataset
        for number, row in enumerate(dataset.select_columns(["prompt_ids", "completion_ids"])):
            if text := problem(row):
                raise UserError(f"{dataset_name} row {number}: {text}")
        return dataset

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Not earlier: a frozen model may score and be evaluated.
        _require_trainable(self.model)
        return super().train(*args, **kwargs)

    # ---- loss and log ----

    _completed = staticmethod(append_reward_token)
    _read = staticmethod(read_scores)
    _logged_of_pairs: ClassVar = {"accuracy": ("scores", "accuracy"), "margin": ("scores", "margin")}

    def _losses(self, values: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        args, scores, ranks = self.args, values["scores"], inputs["ranks"]
        losses = ranking_loss(
            scores,
            ranks,
            loss_type=args.loss_type,
            ties=args.ties,
            label_smoothing=args.label_smoothing,
            margins=rating_margins(inputs["ratings"], args.margin_coef) if args.margin_coef else None,
            reduction="none",
        )
        if args.center_rewards_coefficient is None:
            return losses
        return losses + args.center_rewards_coefficient * centering_loss(scores, ranks, reduction="none")

    def _more_ratios(self, values: dict[str, Tensor], pairs: Tensor, inputs: dict[str, Any]) -> dict[str, Ratio]:
        scores, present = values["scores"], inputs["ranks"] > 0
        extremes = torch.stack([scores[present].min(), scores[present].max()])
        extremes = self.accelerator.gather(extremes)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["min_reward"].append(extremes.min().item())
        metrics["max_reward"].append(extremes.max().item())
        return {"mean_reward": (scores.sum(1), present.sum(1))}

    # ---- scoring ----

    def center_on(self, demonstrations: Iterable[Mapping[str, Any]]) -> float:
        """Set the bias so that demonstrations score 0 on average (InstructGPT, section 3.5); returns the bias.

        Args:
            demonstrations: rows with `prompt` and `completion`.

        Raises:
            ValueError: there is no row, or naming the first row and field that is not as it should be.
        """
        rows = list(demonstrations)
        if not rows:
            raise UserError("`center_on` needs at least one demonstration")
        validate_demonstrations(rows, "center_on")
        scores = self.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
        set_reward_bias(self.model, get_reward_bias(self.model) + sum(scores) / len(scores))
        return get_reward_bias(self.model)

    # ---- saving and loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_reward_bias(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_reward_bias(self.state.best_model_checkpoint)

    def _load_reward_bias(self, checkpoint: str) -> None:
        """Trainer loads weights; the bias is in the `config.json` next to them, which lacks it if it was never set."""
        if config := saved_config(checkpoint):
            set_reward_bias(self.model, config.get("reward_bias", 0.0))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        keep_pad_from_eos(self.model, self.processing_class.eos_token_id)
        keep_logit_plain(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            # The adapter's directory carries the bias.
            save_config_beside(self.model, output_dir or self.args.output_dir)


def _revision(args: RankedRewardConfig) -> dict[str, str | None]:
    return {"revision": (args.model_init_kwargs or {}).get("revision")}


def _has_score_head(path: str, args: RankedRewardConfig) -> bool:
    if find_adapter_config_file(path, **_revision(args)) is not None:
        raise UserError(
            f"{path} is an adapter: merge it into its base first (`merge_and_unload`, then save), or load it as a "
            "trainable PeftModel"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code, **_revision(args))
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _reward_token_id(model: str | PreTrainedModel | PeftModel, args: RankedRewardConfig) -> int | None:
    """The token at which a model reads its score already; a language model's is another model's."""
    if not isinstance(model, str):
        return getattr(model.config, "reward_token_id", None)
    if not _has_score_head(model, args):
        return None
    return saved_config(model, **_revision(args)).get("reward_token_id")


def _with_score_head(peft_config: PeftConfig) -> PeftConfig:
    if peft_config.is_prompt_learning or not hasattr(peft_config, "modules_to_save"):
        raise UserError(
            f"{type(peft_config).__name__} cannot keep a reward head; use an adapter on weights, such as LoraConfig"
        )
    if peft_config.task_type not in (None, "SEQ_CLS"):
        raise UserError(f"a reward model needs task_type='SEQ_CLS', got {str(peft_config.task_type)!r}")
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    if "score" not in (peft_config.modules_to_save or []):
        logger.info("Adding 'score' to modules_to_save, so that the reward head is trained and saved.")
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), "score"]
    return peft_config


def _require_trainable(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "`model` has no weight to train: every one has requires_grad=False, as `load_reward_model` freezes a model "
            "for scoring; to train a full reward model further, give its path or "
            "`AutoModelForSequenceClassification.from_pretrained(path)`, and for an adapter "
            "`prefopt.models.checkpoints.reward_model_from_adapter(path)`"
        )


def _require_trainable_head(model: PeftModel) -> None:
    head = model.get_base_model().score
    if not (isinstance(head, ModulesToSaveWrapper) and any(p.requires_grad for p in head.parameters())):
        raise UserError(
            "the PeftModel's `score` head is not trainable or would not be saved: make it with "
            "modules_to_save=['score'] and is_trainable=True (`prefopt.models.checkpoints.reward_model_from_adapter` "
            "loads a saved reward model so), or pass `peft_config` instead"
        )
