"""PPOPtxConfig: defaults, refusals, and a decision for every field of GRPOConfig."""

import inspect
from dataclasses import fields

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from prefopt.trainers.ppo_ptx.config import ELSEWHERE, FIXED, HONORED, REFUSED, PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer


def grpo_fields():
    return {f.name: f for f in fields(GRPOConfig)}.keys() - {f.name for f in fields(GRPOConfig.__base__)}


def test_default_config_constructs_without_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.trainers.ppo_ptx.config.is_torch_bf16_gpu_available", lambda: False)
    args = PPOPtxConfig(str(tmp_path))
    assert (args.bf16, args.num_generations, args.beta) == (False, 1, 0.0)
    assert (args.kl_coef, args.ptx_coef, args.ptx_batch_ratio) == (0.02, 27.8, 8.0)


def test_one_completion_per_prompt_is_a_plain_one(tmp_path):
    """Once TRL allows it, `_OnePerPrompt` can go."""
    with pytest.raises(ValueError, match="at least 2 generations per prompt"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=1)
    args = PPOPtxConfig(str(tmp_path), use_cpu=True)
    assert type(args.num_generations) is int
    assert args.num_generations < 2


def test_every_grpo_field_has_one_decision():
    decided = [*HONORED, *FIXED, *REFUSED]
    assert grpo_fields() <= set(decided) <= grpo_fields() | {f.name for f in fields(TrainingArguments)}
    assert len(decided) == len(set(decided))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lam", "takes no 'lam': set `gae_lambda`"),
        ("total_episodes", "takes no 'total_episodes': set `max_steps` or `num_train_epochs`"),
        ("learnin_rate", "takes no 'learnin_rate' (did you mean 'learning_rate'?); "),
    ],
)
def test_options_of_trls_ppo_are_answered_by_what_is_taken_here(name, said, tmp_path):
    with pytest.raises(TypeError, match=r"^PPOPtxConfig takes no ") as stop:
        PPOPtxConfig(str(tmp_path), use_cpu=True, **{name: 1})
    assert said in str(stop.value)
    assert "docs/from_trl_ppo.md" in str(stop.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reward_processing_classes", "reward models score the policy's token ids"),
        ("ref_model", "the reference is the model that the run starts from"),
        ("reward_model", "give it in `reward_funcs`"),
        ("tools", "tools that are called are not supported"),
        ("rollout_func", "an episode is a prompt and one response"),
        ("environment_factory", "an episode is a prompt and one response"),
    ],
)
def test_arguments_of_trls_trainers_are_answered_by_what_is_taken_here(name, said):
    with pytest.raises(TypeError, match=r"^PPOPtxTrainer takes no ") as stop:
        PPOPtxTrainer("model", "reward", **{name: object()})
    assert said in str(stop.value)
    assert "docs/from_trl_ppo.md" in str(stop.value)


def test_what_is_answered_so_is_not_taken():
    taken = {f.name for f in fields(PPOPtxConfig)} | set(inspect.signature(PPOPtxTrainer.__init__).parameters)
    assert not taken & set(ELSEWHERE)


OTHER = {bool: True, int: 3, float: 0.375, str: "other", type(None): 0.375}


@pytest.mark.parametrize("name", sorted(FIXED | REFUSED))
def test_other_value_raises_its_sentence(name, tmp_path):
    default = {f.name: f.default for f in fields(PPOPtxConfig)}[name]
    other = (not default) if isinstance(default, bool) else OTHER[type(default)]
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        PPOPtxConfig(str(tmp_path), **{name: other})
    assert str(error.value).endswith({**FIXED, **REFUSED}[name])


@pytest.mark.parametrize("name", sorted(FIXED | REFUSED))
def test_default_spelled_out_is_accepted(name, tmp_path):
    default = {f.name: f.default for f in fields(PPOPtxConfig)}[name]
    assert getattr(PPOPtxConfig(str(tmp_path), **{name: default}), name) == default


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_any_rollout_size(rows, tmp_path):
    args = PPOPtxConfig(str(tmp_path), per_device_train_batch_size=rows)
    assert args.generation_batch_size == rows
    assert type(args.num_generations) is int


def test_paper_schedule(tmp_path):
    args = PPOPtxConfig(
        str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=8, generation_batch_size=512
    )
    assert args.steps_per_generation / args.gradient_accumulation_steps == 512 / 64


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "whole minibatches"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "whole minibatches"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"ptx_batch_ratio": float("nan")}, "ptx_batch_ratio"),
        ({"gae_lambda": 1.5}, "gae_lambda"),
        ({"num_generations": 0}, "num_generations"),
        ({"generation_kwargs": {"do_sample": False}}, "greedy"),
        ({"generation_kwargs": '{"do_sample": false}'}, "greedy"),
        ({"generation_kwargs": {"top_k": 3}}, "generation_kwargs: top_k=3 .* unfiltered"),
        ({"generation_kwargs": {"min_p": 0.1}}, "unfiltered"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "unfiltered"),
        ({"generation_kwargs": {"min_new_tokens": 16}}, "unfiltered"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "unfiltered"),
        ({"generation_kwargs": {"presence_penalty": 0.5}}, "unfiltered"),
        ({"generation_kwargs": {"num_beams": 3}}, "unfiltered"),
        ({"generation_kwargs": {"temperature": 0.2}}, "the field `temperature`"),
        ({"generation_kwargs": {"max_new_tokens": 16}}, "max_completion_length"),
        ({"fp16": True}, "fp16"),
        ({"per_device_train_batch_size": 4, "num_generations": 3}, "divisible"),
    ],
)
def test_bad_values_raise(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        PPOPtxConfig(str(tmp_path), **options)


def test_generation_kwargs_that_leave_the_policy_as_it_is_are_taken(tmp_path):
    kwargs = {"suppress_tokens": [5], "do_sample": True, "top_k": 0, "top_p": 1.0, "num_beams": 1, "use_cache": True}
    assert PPOPtxConfig(str(tmp_path), generation_kwargs=kwargs).generation_kwargs == kwargs


def test_unknown_option_raises(tmp_path):
    with pytest.raises(TypeError, match="learnin_rate"):
        PPOPtxConfig(str(tmp_path), learnin_rate=1e-5)
