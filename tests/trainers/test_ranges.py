"""Numbers that no training can have are refused where they are set, by name."""

import math

import pytest

from prefopt import PPOPtxConfig, RankedDPOConfig, RankedRewardConfig
from prefopt.errors import UserError
from prefopt.recipes.sft import SFTStepConfig
from prefopt.trainers.ppo_ptx.config import RANGES
from prefopt.trainers.shared.ranges import TRAINING, Range

CONFIGS = (SFTStepConfig, RankedRewardConfig, RankedDPOConfig, PPOPtxConfig)
NEVER = (math.nan, -1, "0.1", True, -math.inf)


def make(config, tmp_path, **options):
    return config(str(tmp_path), report_to="none", use_cpu=True, **options)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", TRAINING)
def test_what_no_option_of_training_may_be(tmp_path, config, name):
    for value in NEVER:
        with pytest.raises(UserError, match=f"^{name}="):
            make(config, tmp_path, **{name: value})


@pytest.mark.parametrize("name", RANGES)
def test_what_no_option_of_ppo_may_be(tmp_path, name):
    for value in NEVER:
        with pytest.raises(UserError, match=f"^{name}="):
            make(PPOPtxConfig, tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SFTStepConfig, {"per_device_train_batch_size": 0}),
        (SFTStepConfig, {"num_train_epochs": 0}),
        (RankedRewardConfig, {"num_train_epochs": math.nan}),
        (RankedRewardConfig, {"learning_rate": math.inf}),
        (RankedDPOConfig, {"gradient_accumulation_steps": 0}),
        (RankedDPOConfig, {"save_steps": 0}),
        (RankedDPOConfig, {"adam_beta1": 1.5}),
        (PPOPtxConfig, {"epsilon": 0}),
        (PPOPtxConfig, {"temperature": 0}),
        (PPOPtxConfig, {"kl_coef": math.inf}),
        (PPOPtxConfig, {"max_completion_length": 0}),
        (PPOPtxConfig, {"max_completion_length": 2.5}),
        (PPOPtxConfig, {"gae_lambda": 2}),
        (PPOPtxConfig, {"value_clip_range": 0}),
    ],
)
def test_the_ends_of_ranges_are_refused(tmp_path, config, options):
    with pytest.raises(UserError, match=f"^{next(iter(options))}="):
        make(config, tmp_path, **options)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_text_where_a_mapping_belongs_is_refused(tmp_path, config):
    for name in ("model_init_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        with pytest.raises(UserError, match=f"{name}='x': expected pairs"):
            make(config, tmp_path, **{name: "x"})
        assert getattr(make(config, tmp_path, **{name: '{"a": 1}'}), name) == {"a": 1}


@pytest.mark.parametrize("config", CONFIGS)
def test_files_that_are_not_there_and_arguments_without_a_value_are_named(tmp_path, config):
    for name in ("accelerator_config", "fsdp_config"):
        with pytest.raises(UserError, match=f"{name}='x': there is no such file"):
            make(config, tmp_path, **{name: "x"})
    with pytest.raises(UserError, match="optim_args='betas': expected name=value"):
        make(config, tmp_path, optim_args="betas")
    (tmp_path / "a.json").write_text("{}")
    assert make(config, tmp_path, fsdp_config=str(tmp_path / "a.json"), optim_args="a=1, b=2").optim_args == "a=1, b=2"


def test_all_that_cannot_be_meant_is_named_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        make(SFTStepConfig, tmp_path, learning_rate=-1.0, save_steps=0, bf16="x")
    for told in ("learning_rate=-1.0: expected", "save_steps=0: expected", "bf16='x': expected true or false"):
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        *(
            (config, options)
            for config in CONFIGS
            for options in ({"max_steps": 1.5}, {"max_steps": None}, {"use_cpu": "yes"})
        ),
        (PPOPtxConfig, {"use_vllm": "yes"}),
        (PPOPtxConfig, {"ptx_batch_ratio": 0}),
        (PPOPtxConfig, {"steps_per_generation": 0}),
        (PPOPtxConfig, {"reward_weights": "x"}),
        (PPOPtxConfig, {"reward_weights": [1.0, math.nan]}),
        (PPOPtxConfig, {"generation_kwargs": [1]}),
    ],
)
def test_what_is_of_another_type_is_refused(tmp_path, config, options):
    with pytest.raises(UserError, match=f"^{next(iter(options))}="):
        config(str(tmp_path), **{"report_to": "none", "use_cpu": True, **options})


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrent": False}}, "preserve_rng_state, use_reentrant, "),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "num_cycles$"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}, "lr_scheduler_type": "linear"}, "none$"),
    ],
)
def test_names_that_a_mapping_cannot_have_are_refused(tmp_path, config, options, names):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=f"^{name}: unknown name '{next(iter(value))}'; expected some of {names}"):
        make(config, tmp_path, **{"lr_scheduler_type": "cosine", **options})


def test_what_has_a_meaning_is_taken(tmp_path):
    make(SFTStepConfig, tmp_path, max_steps=3, num_train_epochs=-1, max_grad_norm=0, learning_rate=0.0)
    make(RankedDPOConfig, tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True})
    make(RankedDPOConfig, tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1})
    make(RankedDPOConfig, tmp_path, save_total_limit=None, eval_steps=None, save_steps=0.1, warmup_steps=0.05)
    args = make(PPOPtxConfig, tmp_path, value_clip_range=math.inf, ema_decay=0.992, kl_target=None)
    assert args.value_clip_range == math.inf


def test_a_range_says_what_it_is():
    assert str(Range(1, is_whole=True)) == "a whole number from 1"
    assert str(Range(is_open=True, also=(None,))) == "a finite number above 0, or None"
    assert str(Range(most=1)) == "a finite number from 0 to 1"
