"""What PPO-ptx refuses under FSDP2; that it trains is shown in `tests/trainers/test_scale.py`."""

from types import SimpleNamespace

import pytest

from prefopt.trainers.ppo_ptx.sharding import check_fsdp
from tests.trainers.ppo_ptx.conftest import config

PLUGIN = {
    "fsdp_version": 2,
    "state_dict_type": "StateDictType.FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
    "activation_checkpointing": False,
}


@pytest.mark.parametrize(
    ("plugin", "options", "sentence"),
    [
        ({"fsdp_version": 1}, {}, "fsdp_version: 1 .*set 2"),
        ({"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}, {}, "fsdp_state_dict_type .*set FULL_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading: true .*set false"),
        ({"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing: true .*gradient_checkpointing=True"),
        ({}, {"use_vllm": True}, "use_vllm=True .*never run"),
        (
            {},
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True .*leave it off",
        ),
    ],
)
def test_settings_that_sharded_weights_do_not_take_are_refused(plugin, options, sentence, tmp_path):
    args = config(tmp_path)
    check_fsdp(SimpleNamespace(**PLUGIN), args)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=sentence):
        check_fsdp(SimpleNamespace(**{**PLUGIN, **plugin}), args)
