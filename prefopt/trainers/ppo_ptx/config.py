"""Settings of PPO-ptx (InstructGPT Eq. 2): PPO's own fields, and what becomes of every field of TRL's GRPOConfig."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from prefopt.errors import UserError
from prefopt.trainers.shared import pretraining
from prefopt.trainers.shared.arguments import refuse_unknown
from prefopt.trainers.shared.precision import is_asked_for
from prefopt.trainers.shared.pretraining import PretrainingOptions
from prefopt.trainers.shared.ranges import COUNT, POSITIVE, SHARE, Range, check_ranges, is_number

# GRPOConfig's own fields (beyond transformers' TrainingArguments) that mean here what they mean in TRL.
HONORED = frozenset(
    {
        "model_init_kwargs",
        "trust_remote_code",
        "disable_dropout",
        "cast_lm_head_to_fp32",
        "num_generations",
        "num_generations_eval",
        "max_completion_length",
        "shuffle_dataset",
        "pad_to_multiple_of",
        "generation_batch_size",
        "steps_per_generation",
        "temperature",
        "generation_kwargs",
        "chat_template_kwargs",
        "cache_implementation",
        "num_iterations",
        "epsilon",
        "reward_weights",
        "log_completions",
        "num_completions_to_print",
        "log_unique_prompts",
        "log_completions_hub_repo",
        "use_transformers_continuous_batching",
        "transformers_continuous_batching_config",
        "use_vllm",
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
    }
)

_SAMPLER = "the ratio of PPO needs tokens drawn from the policy itself, so sampling stays unfiltered"
_LENGTH = "set `max_completion_length`"
_ENTROPY = "InstructGPT's objective (Eq. 2) has no entropy bonus; the entropy is logged as `entropy`"
_LOSS = "the loss is PPO's clipped surrogate per token; `epsilon` is its clip range"
_REFERENCE = "the KL reference is the SFT model and does not move"

# Fields that keep one value: any other raises ValueError with this sentence.
FIXED = {
    "scale_rewards": "advantages come from GAE, not from group statistics; see `whiten_advantages`",
    "multi_objective_aggregation": "rewards are weighted by `reward_weights` and summed",
    "importance_sampling_level": "the ratio is per token, as are the advantages",
    "loss_type": _LOSS,
    "use_bias_correction_kl": "there is no KL term in the loss: the KL sits in the reward (`kl_coef`)",
    "ds3_gather_for_generation": "DeepSpeed is not supported: it would step on each of the two backward passes",
    "log_multimodal": "only text is supported",
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "sapo_temperature_neg": _LOSS,
    "sapo_temperature_pos": _LOSS,
    "vespo_k_pos": _LOSS,
    "vespo_lambda_pos": _LOSS,
    "vespo_k_neg": _LOSS,
    "vespo_lambda_neg": _LOSS,
    "vllm_structured_outputs_regex": _SAMPLER,
    "vllm_importance_sampling_cap": "it is deprecated in TRL: set `vllm_importance_sampling_clip_max`",
}

# Features that would change the algorithm: switching one on raises ValueError with this sentence.
REFUSED = {
    "beta": "the KL penalty sits in the reward, not in the loss: set `kl_coef` (the paper's beta) instead",
    "router_aux_loss_coef": "the load-balancing loss of mixture-of-experts models is not added; 0.0 turns it off",
    "top_p": _SAMPLER,
    "top_k": _SAMPLER,
    "min_p": _SAMPLER,
    "repetition_penalty": _SAMPLER,
    "delta": _LOSS,
    "epsilon_high": _LOSS,
    "off_policy_mask_threshold": _LOSS,
    "top_entropy_quantile": _LOSS,
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "mask_truncated_completions": "a completion without EOS is real: see `missing_eos_penalty`",
    "sync_ref_model": _REFERENCE,
    "max_tool_calling_iterations": "episodes are a prompt and one response; tools are not supported",
    "use_transformers_paged": "it is deprecated in TRL: set `use_transformers_continuous_batching`",
    "neftune_noise_alpha": "noise in the embeddings moves the ratio of PPO off 1 before the policy has moved",
    "label_smoothing_factor": "no term of Eq. 2 has labels to smooth",
    "data_seed": "prompts and pretraining text are drawn by `seed`",
}

# Arguments and options of TRL's PPOTrainer, PPOConfig (until 1.12) and GRPOTrainer that are called otherwise here or are not
# taken, and what is: the tables of docs/from_trl_ppo.md.
_ONE_RESPONSE = "an episode is a prompt and one response"
ELSEWHERE = {
    "cliprange": "set `epsilon`",
    "cliprange_value": "set `value_clip_range`",
    "config": "the third argument is `args`, a PPOPtxConfig",
    "data_collator": "batches are made here",
    "environment_factory": _ONE_RESPONSE,
    "gamma": "set `discount`",
    "lam": "set `gae_lambda`",
    "local_rollout_forward_batch_size": "set `per_device_train_batch_size`",
    "num_mini_batches": "set `generation_batch_size`",
    "num_ppo_epochs": "set `num_iterations`",
    "num_sample_generations": "set `log_completions`",
    "policy": "give it as `model`",
    "policy_model": "give it as `model`",
    "ref_model": "the reference is the model that the run starts from",
    "ref_policy": "the reference is the model that the run starts from",
    "response_length": "set `max_completion_length`",
    "reward_model": "give it in `reward_funcs`",
    "reward_model_path": "give it in `reward_funcs`; in the recipe, `reward_model_name_or_path`",
    "reward_processing_classes": "reward models score the policy's token ids, with its tokenizer",
    "rollout_func": _ONE_RESPONSE,
    "sft_model_path": "give it as `model`; in the recipe, `model_name_or_path`",
    "stop_token": "completions stop at the EOS tokens of the model's generation config",
    "stop_token_id": "completions stop at the EOS tokens of the model's generation config",
    "tokenizer": "give it as `processing_class`",
    "tools": "tools that are called are not supported; a prompt's own schemas stand in the column `tools`",
    "total_episodes": "set `max_steps` or `num_train_epochs`; a step takes one minibatch",
    "whiten_rewards": "advantages are whitened: `whiten_advantages`",
}
PAGE = "docs/from_trl_ppo.md"

# Of generation_kwargs, what says how tokens are computed or where a completion stops, and not which tokens are drawn. A
# token that is suppressed is one that the policy is not to say at all.
GENERATION_KWARGS = frozenset(
    {
        "cache_config",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "max_cache_len",
        "max_time",
        "prefill_chunk_size",
        "seed",
        "stop",
        "stop_token_ids",
        "suppress_tokens",
        "use_cache",
    }
)
# What may be said as it is anyway, and the sentence for another value; every other name raises with `_SAMPLER`.
PLAIN_GENERATION = {
    "do_sample": (True, "it makes rollouts greedy; PPO needs samples"),
    "num_beams": (1, _SAMPLER),
    "temperature": (None, "set the field `temperature`, at which ratio and KL are taken, too"),
    "max_new_tokens": (None, _LENGTH),
    "max_length": (None, _LENGTH),
    "max_tokens": (None, _LENGTH),
    "eos_token_id": (None, "set it in the model's generation config, which says where rollouts end"),
}


OPTIONAL = Range(is_open=True, also=(None,))
RANGES = {
    **pretraining.RANGES,
    "num_generations": COUNT,
    "num_iterations": COUNT,
    "max_completion_length": COUNT,
    "temperature": POSITIVE,
    "epsilon": POSITIVE,
    "kl_coef": Range(),
    "kl_target": OPTIONAL,
    "kl_horizon": POSITIVE,
    "vf_coef": Range(),
    "value_clip_range": Range(is_open=True, also=(math.inf,)),
    "value_learning_rate": Range(),
    "value_warmup_steps": Range(is_whole=True),
    "warmup_start_ratio": SHARE,
    "ema_decay": Range(most=1, also=(None,)),
    "discount": SHARE,
    "gae_lambda": SHARE,
    "score_clip": OPTIONAL,
    "missing_eos_penalty": Range(),
    "steps_per_generation": Range(1, is_whole=True, also=(None,)),
    "generation_batch_size": Range(1, is_whole=True, also=(None,)),
}


class _OnePerPrompt(int):
    """The number 1, which is not less than 2: PPO has a value function and needs no group of completions.

    GRPOConfig.__post_init__ divides the batch by `num_generations`, which is right for 1 as well, and ends with

        if self.num_generations < 2:
            raise ValueError("GRPO requires at least 2 generations per prompt to calculate the advantages. ...")

    There is no seam to get past that one line: it stands in the middle of a long method that must run. So the number
    that it sees answers False, for as long as the method runs; `PPOPtxConfig.num_generations` is a plain 1 afterwards.
    """

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class PPOPtxConfig(PretrainingOptions, GRPOConfig):
    r"""
    Configuration of [`PPOPtxTrainer`]. Fields not listed are those of [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`]; `HONORED`, `FIXED` and `REFUSED` in this module say what becomes of each of
    GRPOConfig's own.

    InstructGPT's schedule (C.4: 512 episodes per rollout, 8 minibatches of 64, one inner epoch) on one process:

    | paper | here |
    |---|---|
    | minibatch 64 | `per_device_train_batch_size=8`, `gradient_accumulation_steps=8` (times processes) |
    | batch 512 | `generation_batch_size=512`, or `steps_per_generation=64`: 512 / 8 micro-batches |
    | 1 inner epoch | `num_iterations=1` |
    | 512 pretraining examples per step | `ptx_batch_ratio=8` |

    By default a rollout is one minibatch, whatever its size. Every inner epoch divides the rollout into minibatches
    anew.

    Parameters:
        > Objective (InstructGPT Eq. 2): policy + vf_coef * value + ptx_coef * LM

        kl_coef (`float`, defaults to `0.02`): the paper's beta; 0 turns the penalty off, the KL is logged all the same.
        kl_estimator (`str`, defaults to `"k1"`): KL per token in the reward and in `objective/kl`. `"k1"`: log-ratio of
            the sampled token, the paper's; `"k3"`: never negative, less variance; `"full"`: exact sum over the
            vocabulary, for two more forward passes over each rollout.
        kl_target (`float`, *optional*): KL per episode (nats) towards which `kl_coef`, then the first coefficient only,
            is adapted after each rollout (Ziegler et al. 2019, section 2.2). None keeps it fixed, as in the paper.
        kl_horizon (`float`, defaults to `10000`): episodes in which an error at its limit changes the coefficient by
            about a fifth; at least those of one rollout.
        ptx_coef (`float`, defaults to `27.8`): the paper's gamma, on the mean loss per pretraining token; 0 is "PPO".
        ptx_batch_ratio (`float`, defaults to `8.0`): pretraining sequences per episode of a minibatch (at least one
            sequence a step). Changes the variance of the pretraining gradient, not its scale.
        vf_coef (`float`, defaults to `0.1`): weight of the value loss. The paper gives none, as its value function is
            a network of its own; it matters where the value head shares the policy's trunk.

        > Rewards and advantages

        discount (`float`, defaults to `1.0`), gae_lambda (`float`, defaults to `0.95`): of GAE; the paper does not
            discount and gives no lambda.
        normalize_scores (`bool`, defaults to `False`): subtract the mean and divide by the standard deviation of the
            scores of all training episodes so far. A value function that starts as the reward model predicts scores
            that are not normalized.
        score_clip (`float`, *optional*): scores are clipped to +- this, after normalization; None is off.
        missing_eos_penalty (`float`, defaults to `0.0`): subtracted from the score of a completion without EOS, after
            normalization and clipping.
        whiten_advantages (`bool`, defaults to `True`): mean 0, variance 1 over the whole rollout on all processes.

        > Clipping and learning rates

        epsilon (`float`, defaults to `0.2`): clip range of the ratio (TRL's name).
        value_clip_range (`float`, defaults to `0.2`): clip range of the values, in units of the reward.
        max_grad_norm (`float`, defaults to `1.0`): clips the gradient of the policy and that of the value function,
            each by itself.
        value_learning_rate (`float`, defaults to `9e-6`): of the value function, on the schedule of `learning_rate`.
        value_warmup_steps (`int`, defaults to `0`): first optimizer steps in which the value function learns and the
            policy stays (no pretraining text is taken either). Worth having where no reward model gives it a start.
        fit_value_head (`bool`, defaults to `True`): a value function that starts as a reward model gets, once, the linear
            head that fits the returns of the first rollout (`value_start`). A reward model's own head was never trained
            at the tokens before the last, where it explains less than a constant; False keeps it, as in the paper.
        warmup_start_ratio (`float`, defaults to `0.1`): the warm-up rises from this share of both learning rates.
        warmup_steps (`float`, *optional*): as in `TrainingArguments`; None is the paper's, the optimizer steps of the
            first 10 rollouts.

        > Average of the weights

        ema_decay (`float`, *optional*): after every optimizer step, average = ema_decay * average + (1 - ema_decay) *
            weights, over the policy's trainable weights (with LoRA: the factors); the paper's is 0.992. `save_model`
            writes the policy with averaged weights to `ema/`, beside the last one, and
            `PPOPtxTrainer.averaged_weights()` evaluates it. Needs one more copy of those weights in fp32; None is off.

        > Pretraining text

        ptx_max_length (`int`, defaults to `2048`): documents are packed into blocks of this many tokens.
        ptx_per_device_batch_size (`int`, defaults to `1`): sequences per forward. Their hidden states are in memory;
            their logits are computed in tiles of 4096 positions x 32768 words, and again in the backward pass.

        > Forward passes

        prefix_sharing (`bool`, defaults to `True`): with `num_generations` above 1, forward a prompt once for all of its
            completions in a batch, in the passes of every role. Minibatches then take whole prompts. Off for
            architectures that are not proved to give equal results, with a warning that says why.

    > [!NOTE]
    > Rollouts come from transformers, from its continuous batching (with `bf16=False`), or from vLLM, as in
    > GRPOTrainer. The log-probabilities of PPO's ratio and of the KL are the policy's own in any case; what vLLM
    > sampled by is corrected for by TRL's importance weights, which multiply the advantages of the policy loss. Of a
    > policy that trains LoRA factors, on a base in 4 bit as well, vLLM gets each version of the adapter; any other is
    > sent whole.

    > [!NOTE]
    > Defaults that differ from GRPOConfig: `num_generations=1`, `disable_dropout=True` (dropout would make the first
    > ratio differ from 1), `bf16` only on a GPU that has it, `learning_rate=5e-6` (the paper's runs above 8.05e-6
    > diverged), `adam_beta2=0.95`, constant schedule after the warm-up. The paper batches 512 episodes; here the batch
    > follows the device settings.
    """

    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt of a rollout."})
    disable_dropout: bool = field(default=True, metadata={"help": "Disable dropout in policy and value model."})
    scale_rewards: str = field(default="none", metadata={"help": "Fixed: advantages come from GAE."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate of the policy."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's beta2; InstructGPT: 0.95."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "InstructGPT: constant after the warm-up."}
    )
    warmup_steps: float | None = field(
        default=None, metadata={"help": "Warm-up steps of the learning rates; default: those of 10 rollouts."}
    )
    warmup_start_ratio: float = field(
        default=0.1, metadata={"help": "Share of the peak learning rates that the warm-up starts from."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the policy's weights with this decay (InstructGPT: 0.992)."}
    )

    kl_coef: float = field(default=0.02, metadata={"help": "KL penalty per token in the reward (the paper's beta)."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "KL per token in the reward.", "choices": ["k1", "k3", "full"]}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "KL per episode that `kl_coef` is adapted to; None: a fixed one."}
    )
    kl_horizon: float = field(default=10_000, metadata={"help": "Episodes over which `kl_coef` adapts."})
    ptx_coef: float = field(
        default=27.8, metadata={"help": "Weight of the pretraining loss (the paper's gamma); 0: plain PPO."}
    )
    ptx_batch_ratio: float = field(default=8.0, metadata={"help": "Pretraining sequences per episode of a minibatch."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    discount: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    normalize_scores: bool = field(default=False, metadata={"help": "Mean 0, variance 1 over all scores so far."})
    score_clip: float | None = field(
        default=None, metadata={"help": "Bound of the scores, after normalization; None: off."}
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from the score of a completion without EOS."}
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Whiten advantages over the whole rollout."})
    value_clip_range: float = field(default=0.2, metadata={"help": "Clip range of the values."})
    value_warmup_steps: int = field(
        default=0, metadata={"help": "First steps in which only the value function learns."}
    )
    fit_value_head: bool = field(
        default=True, metadata={"help": "Fit the head of a copied reward model to the returns of the first rollout."}
    )
    value_learning_rate: float = field(default=9e-6, metadata={"help": "Peak learning rate of the value function."})
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Forward a prompt with several completions once, where the model allows it."}
    )

    def __new__(cls, *args: Any, **options: Any) -> "PPOPtxConfig":
        # Before the generated __init__, which would answer a name of TRL's with the bare name.
        refuse_unknown(cls.__name__, options, [f.name for f in fields(cls) if f.init], ELSEWHERE, PAGE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._refuse_options()
        # TRL's default is True, which raises without a GPU.
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        completions = self.num_generations
        # See `_OnePerPrompt`: what TRL's checks see.
        if completions == 1:
            self.num_generations = _OnePerPrompt(1)
        warmup_steps, self.warmup_steps = self.warmup_steps, self.warmup_steps or 0
        super().__post_init__()
        self.num_generations = completions
        # Parsed by now, if it was a JSON string.
        if not isinstance(self.generation_kwargs or {}, dict):
            raise UserError(f"generation_kwargs={self.generation_kwargs!r}: expected `name: value` pairs")
        for name, value in (self.generation_kwargs or {}).items():
            plain, sentence = PLAIN_GENERATION.get(name, (getattr(GRPOConfig, name, None), _SAMPLER))
            if name not in GENERATION_KWARGS and value not in (None, plain):
                raise UserError(f"generation_kwargs: {name}={value!r} is not supported by PPO-ptx: {sentence}")
        if self.fp16:
            raise UserError("fp16 loss scaling does not carry over several backward passes: use bf16 or fp32")
        if self.use_transformers_continuous_batching and self.bf16:
            raise UserError(
                "use_transformers_continuous_batching with bf16=True: TRL casts the policy's weights to 16 bit in "
                "place, and they would train so; set bf16=False (a policy may be loaded in 16 bit), or leave it off"
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise UserError(
                f"a rollout must hold whole minibatches: steps_per_generation ({self.steps_per_generation}; "
                "= generation_batch_size / (per_device_train_batch_size * processes)) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )
        # InstructGPT C.4: "the first 10 iterations", each a batch of 512 episodes.
        if warmup_steps is None:
            micro_batches = 10 * self.steps_per_generation * self.num_iterations
            self.warmup_steps = micro_batches // self.gradient_accumulation_steps
        if self.kl_target is not None and self.kl_horizon < self.generation_batch_size:
            raise UserError(
                f"kl_horizon={self.kl_horizon} is shorter than a rollout ({self.generation_batch_size} episodes)"
            )

    def _refuse_options(self) -> None:
        if is_asked_for("deepspeed", self):
            raise UserError(
                "DeepSpeed takes an optimizer step with each backward pass, of which a step of PPO-ptx has three (policy, "
                "value function, pretraining): launch with recipes/accelerate/ddp.yaml or fsdp2.yaml; a model too large for "
                "one GPU as a whole also fits with load_in_4bit and use_peft, its four roles on one base"
            )
        defaults = {f.name: f.default for f in fields(self)}
        for name, sentence in {**FIXED, **REFUSED}.items():
            value = getattr(self, name)
            # GRPOConfig's other spelling of scale_rewards.
            off = value is False and defaults[name] == "none"
            if value != defaults[name] and not off and not (name == "router_aux_loss_coef" and value == 0):
                raise UserError(f"{name}={value!r} is not supported by PPO-ptx: {sentence}")
        check_ranges(self)
        check_ranges(self, RANGES)
        weights = self.reward_weights
        if weights is not None and not (isinstance(weights, list | tuple) and all(map(is_number, weights))):
            raise UserError(f"reward_weights={weights!r}: expected a finite number for each reward, or None")
        if self.kl_estimator not in ("k1", "k3", "full"):
            raise UserError(f"kl_estimator={self.kl_estimator!r}: expected 'k1', 'k3' or 'full'")
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError(f"kl_target={self.kl_target} needs kl_coef above 0: it adapts it by factors")
