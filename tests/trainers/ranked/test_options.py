"""Options of the ranked trainers that make no sense stop at once, with one sentence that names the field."""

import math
import re

import pytest

from prefopt import RankedDPOConfig, RankedRewardConfig

BOTH = (RankedRewardConfig, RankedDPOConfig)
WRONG = [
    *[(BOTH, "center_rewards_coefficient", value) for value in (-1, math.nan, math.inf, "0.1", True)],
    *[(BOTH, "margin_coef", value) for value in (-1.0, math.inf, "0.1", None)],
    *[(BOTH, "label_smoothing", value) for value in (math.nan, -0.1, 0.9, "0.1", None)],
    *[(BOTH, "max_tokens_per_forward", value) for value in (True, 1.5, 0, "100")],
    *[(BOTH, "max_length", value) for value in (20.5, -3, 0, "100", True)],
    *[(BOTH, "prefix_sharing", value) for value in ("no", 1, None)],
    *[(BOTH, "label_smoothing_factor", value) for value in (0.1, 1)],
    *[(BOTH, "include_for_metrics", value) for value in (["inputs"], ["loss", "inputs"])],
    *[([RankedDPOConfig], "beta", value) for value in (math.inf, math.nan, "0.1", None, True, -1)],
    *[([RankedDPOConfig], "loss_weights", value) for value in ([0.0], 1.0, ["1"], [math.nan], [True], [-1.0])],
    *[([RankedRewardConfig], "reward_token", value) for value in (7, "", ["<|reward|>"])],
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "name", "value"), [(config, *rest) for configs, *rest in WRONG for config in configs]
)
def test_a_value_that_makes_no_sense_is_refused(config, name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}[ =].*{re.escape(repr(value))}") as caught:
        config(str(tmp_path), report_to="none", use_cpu=True, **{name: value})
    assert caught.value.__cause__ is None  # the sentence is ours, not one about an error in a comparison


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    "options",
    [
        {"center_rewards_coefficient": 0},
        {"center_rewards_coefficient": None},
        {"margin_coef": 1},
        {"label_smoothing": 0},
        {"max_tokens_per_forward": None, "max_length": None},
        {"max_tokens_per_forward": 1, "max_length": 1},
        {"prefix_sharing": False},
        {"include_for_metrics": ["loss"]},
    ],
    ids=str,
)
def test_values_that_make_sense_are_taken(config, options, tmp_path):
    args = config(str(tmp_path), report_to="none", use_cpu=True, **options)
    assert {name: getattr(args, name) for name in options} == options


def test_label_smoothing_is_named_beside_that_of_transformers(tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing` is the share of pairs"):
        RankedRewardConfig(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
