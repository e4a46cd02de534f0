"""What somebody who comes from TRL writes: the same arguments at the same places, others answered in a sentence."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl import DPOTrainer, RewardTrainer

from prefopt import (
    PPOPtxTrainer,
    RankedDPOConfig,
    RankedDPOTrainer,
    RankedRewardConfig,
    RankedRewardTrainer,
)
from prefopt.trainers.ranked.options import ELSEWHERE, PAGE

RANKED = {
    RankedRewardTrainer: (RewardTrainer, RankedRewardConfig),
    RankedDPOTrainer: (DPOTrainer, RankedDPOConfig),
}
REWARD, DPO = RANKED


def places(trainer):
    parameters = inspect.signature(trainer).parameters.values()
    return [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("trainer", RANKED)
def test_an_argument_stands_at_its_place_in_trl(trainer):
    ours = places(trainer)
    assert ours == places(RANKED[trainer][0])[: len(ours)]
    assert ours[-3:] == ["train_dataset", "eval_dataset", "processing_class"]


@pytest.mark.parametrize(
    ("trainer", "name", "said"),
    [
        (REWARD, "ref_model", ": only a policy is held to a reference, as in `RankedDPOTrainer`; a reward model has none"),
        (REWARD, "reward_processing_classes", ": rows are ranked already; `PPOPtxTrainer` learns from rewards"),
        (DPO, "reward_processing_classes", ": rows are ranked already; `PPOPtxTrainer` learns from rewards"),
        (REWARD, "tokenizer", ": it is called `processing_class`"),
        (DPO, "tokenizer", ": it is called `processing_class`"),
        (DPO, "beta", ": set it in `args`, a RankedDPOConfig"),
        (REWARD, "max_length", ": set it in `args`, a RankedRewardConfig"),
        (PPOPtxTrainer, "kl_coef", ": set it in `args`, a PPOPtxConfig"),
        (REWARD, "peft_confg", " (did you mean 'peft_config'?)"),
        (DPO, "peft_confg", " (did you mean 'peft_config'?)"),
        (DPO, "compute_metric", " (did you mean 'compute_metrics'?)"),
        (PPOPtxTrainer, "peft_confg", " (did you mean 'peft_config'?)"),
        (DPO, "zzz", ""),
    ],
)  # fmt: skip
def test_another_argument_is_answered_before_anything_is_loaded(trainer, name, said):
    page = PAGE if trainer in RANKED else "docs/from_trl_ppo.md"
    more = {} if trainer in RANKED else {"reward_funcs": "no-such/reward"}
    expected = f"{trainer.__name__} takes no {name!r}{said}; TRL's names here: {page}"
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        trainer("no-such/model", **more, **{name: object()})


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        (RankedDPOConfig, "learnin_rate", " (did you mean 'learning_rate'?)"),
        (RankedRewardConfig, "learnin_rate", " (did you mean 'learning_rate'?)"),
        (RankedDPOConfig, "max_prompt_length", f": {ELSEWHERE['max_prompt_length']}"),
    ],
)
def test_another_option_is_answered_too(config, name, said, tmp_path):
    expected = f"{config.__name__} takes no {name!r}{said}; TRL's names here: {PAGE}"
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        config(str(tmp_path), **{name: 1})


def test_what_is_answered_so_is_not_taken():
    """`ref_model` is DPO's and no other's."""
    for trainer, (of_trl, config) in RANKED.items():
        taken = {*places(of_trl), *inspect.signature(trainer).parameters, *(f.name for f in fields(config))}
        assert taken & set(ELSEWHERE) == ({"ref_model"} if trainer is DPO else set())


def test_the_page_has_the_names_that_are_not_taken():
    page = (Path(__file__).resolve().parents[2] / PAGE).read_text(encoding="utf-8")
    table = page[page.index("| argument of TRL's trainers | here |") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))) == set(ELSEWHERE)
