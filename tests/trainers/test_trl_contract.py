"""The contract with TRL: it holds, it lists all that the trainers use, and a TRL that breaks it is refused by name.

Names alone do not keep a subclass right: the values that the trainers rely on are pinned here too, on rows of two.
"""

import ast
import inspect
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RewardTrainer
from trl.trainer.utils import RepeatSampler, pad, shuffle_sequence_dict, split_tensor_dict

from prefopt.errors import UserImportError
from prefopt.trainers.shared import trl_contract
from prefopt.trainers.shared.trl_contract import CLASSES, IMPORTS, missing_seams, require_seams, verdicts
from tests.conftest import forget_prefopt, run_in_fork

FILES = sorted((Path(__file__).parents[2] / "prefopt" / "trainers").rglob("*.py"))
SEAMS = [(path, seams) for classes in CLASSES.values() for path, seams in classes.items()]
LISTED = {name for _, seams in SEAMS for name in (*seams.methods, *seams.attributes)}
INNER = {}
for modules in IMPORTS.values():
    for module, names in modules.items():
        INNER.setdefault(module, set()).update(names)


@cache
def source_of(cls):
    return "\n".join(inspect.getsource(base) for base in cls.__mro__ if base is not object)


@cache
def upstream_names():
    classes = (RewardTrainer, DPOTrainer, GRPOTrainer)
    return {name for cls in classes for name in re.findall(r"\b_[a-z]\w*", source_of(cls))}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@cache
def private_names(path):
    """(used or overridden, defined) private attributes of a module; plain functions and variables are its own."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                names = []
                if isinstance(item, ast.FunctionDef):
                    names = [item.name]
                elif isinstance(item, ast.Assign):
                    names = [target.id for target in item.targets if isinstance(target, ast.Name)]
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    names = [item.target.id]
                defined |= {name for name in names if is_private(name)}
    return used | defined, defined


# ---- the installed TRL keeps the contract, and the contract is whole ----


def test_the_installed_trl_has_every_seam():
    assert verdicts() == {"RankedRewardTrainer": [], "RankedDPOTrainer": [], "PPOPtxTrainer": []}


def test_attributes_are_assigned_where_they_are_said_to_be():
    """`missing_seams` looks for the name in the byte code, which is quick; here the sources must assign it."""
    for path, seams in SEAMS:
        module, _, name = path.rpartition(".")
        cls = getattr(import_module(module), name)
        source = source_of(cls)
        for attribute in seams.attributes:
            assigned = re.search(rf"self\.{attribute}(: [^=\n]+)? = ", source)
            assert assigned or hasattr(cls, attribute), f"{name} of trl {trl.__version__} has no {attribute}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_trainers_use_no_unlisted_private_name(path):
    used, _ = private_names(path)
    own = set().union(*(private_names(file)[1] for file in FILES))
    unlisted = {name for name in used - LISTED if name in upstream_names() or name not in own}
    assert not unlisted, (
        f"{path.name} uses private names that the contract does not list, or defines names that exist upstream: "
        f"{sorted(unlisted)}"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_trainers_import_no_unlisted_inner_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
            unlisted = {alias.name for alias in node.names} - INNER.get(node.module, set())
            assert not unlisted, f"{path.name}: {node.module} {sorted(unlisted)}"


def test_everything_listed_is_used():
    names = set()
    for file in FILES:
        tree = ast.parse(file.read_text())
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        names |= private_names(file)[1]
    assert not (LISTED | set().union(*INNER.values())) - names


# ---- a TRL that breaks it ----


def test_a_method_that_is_gone_is_refused_by_name_and_the_other_trainers_go_on(monkeypatch):
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(
        UserImportError,
        match=(
            rf"^PPOPtxTrainer does not work with trl {trl.__version__} and transformers .*: GRPOTrainer has no method "
            r"_calculate_rewards\. Install .*; RankedRewardTrainer and RankedDPOTrainer can be used$"
        ),
    ):
        require_seams("PPOPtxTrainer")
    require_seams("RankedRewardTrainer")
    require_seams("RankedDPOTrainer")


def test_other_parameters_are_refused(monkeypatch):
    def compute_ref_log_probs(self, inputs):
        pass

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", compute_ref_log_probs)
    assert missing_seams("RankedDPOTrainer") == [
        "DPOTrainer.compute_ref_log_probs takes (inputs) instead of (model, inputs)"
    ]
    assert missing_seams("RankedRewardTrainer") == missing_seams("PPOPtxTrainer") == []


def test_moved_names_and_lost_attributes_are_refused(monkeypatch):
    monkeypatch.delattr("trl.trainer.utils.use_adapter")
    assert missing_seams("RankedDPOTrainer") == ["trl.trainer.utils has no use_adapter"]
    monkeypatch.setitem(sys.modules, "trl.models.utils", None)
    assert missing_seams("RankedDPOTrainer")[0].startswith("trl.models.utils cannot be imported (")
    assert missing_seams("RankedRewardTrainer") == []

    monkeypatch.setattr(
        trl_contract, "_names_in_code", lambda cls: {"_metrics", "_name", "_paper", "_tag_names", "_tp_size"}
    )
    assert "RewardTrainer has no attribute _total_train_tokens" in missing_seams("RankedRewardTrainer")


def test_a_fused_head_that_is_triton_alone_is_refused_without_triton(monkeypatch):
    monkeypatch.setattr(trl_contract, "find_spec", lambda name: None)
    assert missing_seams("PPOPtxTrainer") == []
    monkeypatch.delattr("trl.kernels.chunked_logprob._use_triton")
    sentence = "its fused LM head needs Triton, which is not installed (it comes with CUDA builds of torch)"
    assert missing_seams("PPOPtxTrainer") == missing_seams("RankedDPOTrainer") == [sentence]
    assert missing_seams("RankedRewardTrainer") == []
    monkeypatch.setattr(trl_contract, "find_spec", lambda name: object())
    assert missing_seams("PPOPtxTrainer") == []


def test_importing_a_trainer_checks_its_seams_and_no_other(tmp_path):
    def program():
        forget_prefopt()
        del GRPOTrainer._calculate_rewards
        from prefopt import RankedDPOTrainer, RankedRewardTrainer  # noqa: F401

        try:
            from prefopt import PPOPtxTrainer  # noqa: F401
        except ImportError as error:
            print(error)

    assert run_in_fork(program, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert "PPOPtxTrainer does not work with trl" in printed
    assert "GRPOTrainer has no method _calculate_rewards" in printed


# ---- the values that the trainers rely on ----


def test_sampler_goes_over_a_rollout_as_often_as_it_is_told():
    torch.manual_seed(0)
    order = list(RepeatSampler(range(4), mini_repeat_count=2, batch_size=2, repeat_count=3, shuffle=False, seed=0))
    assert order == [0, 0, 1, 1] * 3 + [2, 2, 3, 3] * 3


def test_padding_splitting_and_shuffling_of_rollouts():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert pad(rows, padding_value=9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad(rows, padding_value=9, padding_side="left").tolist() == [[1, 2, 3], [9, 9, 4]]

    rollout = {"x": torch.tensor([[1, 2], [3, 4]]), "y": ["a", "b"], "n": torch.tensor(5), "none": None}
    first, second = split_tensor_dict(rollout, 2)
    assert (first["x"].tolist(), first["y"], first["n"].item(), first["none"]) == ([[1, 2]], ["a"], 5, None)
    assert (second["x"].tolist(), second["y"], second["n"].item()) == ([[3, 4]], ["b"], 5)

    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        shuffled = shuffle_sequence_dict(rollout)
        assert [row[0] for row in shuffled["x"].tolist()] == [{"a": 1, "b": 3}[y] for y in shuffled["y"]]
        seen.add(tuple(shuffled["y"]))
    assert seen == {("a", "b"), ("b", "a")}


@pytest.fixture
def grpo(tmp_path, causal_lm, tokenizer):
    def two_rewards(completions, **kwargs):
        return [float(len(text)) for text in completions]

    def no_reward(completions, **kwargs):
        return [None, 2.0]

    return GRPOTrainer(
        model=causal_lm,
        reward_funcs=[two_rewards, no_reward],
        args=GRPOConfig(
            str(tmp_path),
            bf16=False,
            use_cpu=True,
            beta=0.0,
            epsilon=0.2,
            loss_type="dapo",
            temperature=0.7,
            per_device_train_batch_size=2,
            num_generations=2,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": "the cat"}] * 2),
        processing_class=tokenizer,
    )


def test_rewards_are_a_column_per_function_and_nan_where_there_is_none(grpo):
    rewards = grpo._calculate_rewards([{"prompt": "p"}] * 2, ["p"] * 2, ["ab", "abc"], [[5], [6]])
    assert torch.equal(rewards.isnan(), torch.tensor([[False, True], [False, False]]))
    assert rewards.nan_to_num(-1.0).tolist() == [[2.0, -1.0], [3.0, 2.0]]


def test_log_probabilities_are_those_of_the_sampling_temperature(grpo):
    model = grpo.model.eval()
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    logps, entropies, aux_loss = grpo._get_per_token_logps_and_entropies(
        model, ids, torch.ones_like(ids), 2, compute_entropy=True
    )
    expected = torch.log_softmax(model(ids).logits / 0.7, -1)
    for b in range(2):
        for t in range(2):
            at = expected[b, 2 + t]
            torch.testing.assert_close(logps[b, t], at[ids[b, 3 + t]], rtol=0, atol=1e-5)
            torch.testing.assert_close(entropies[b, t], -(at.exp() * at).sum(), rtol=0, atol=1e-5)
    assert aux_loss is None


def test_policy_loss_takes_an_advantage_per_token(grpo):
    """-min(ratio * A, clip(ratio) * A) over the step's tokens: what PPO-ptx takes from `super()._compute_loss`."""
    model = grpo.model.eval()
    grpo.current_gradient_accumulation_steps = 1
    prompt, completion = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[9, 10, 11], [12, 13, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 3.0, 100.0]])
    ids = torch.cat([prompt, completion], 1)
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).logits / 0.7, -1)
    old = torch.tensor([[0.5, -0.5, 0.1], [0.0, 0.3, 7.0]])
    per_token, total = [], 0.0
    for b in range(2):
        for t in range(3):
            now = logps[b, 1 + t, completion[b, t]].item()
            per_token.append(now)
            if mask[b, t]:
                ratio = torch.exp(-old[b, t]).item()
                clipped = min(max(ratio, 0.8), 1.2)
                total -= min(ratio * advantages[b, t].item(), clipped * advantages[b, t].item())
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": torch.tensor(per_token).view(2, 3) + old,
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo._compute_loss(model, inputs)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_clipping_returns_the_norm_before_it(grpo):
    grpo.args.max_grad_norm = 1.0
    for number, parameter in enumerate(grpo.model.parameters()):
        parameter.grad = torch.full_like(parameter, 3.0 if number == 0 else 0.0)
    first = next(grpo.model.parameters())
    norm = grpo._clip_grad_norm(grpo.model)
    assert float(norm) == pytest.approx(3.0 * first.numel() ** 0.5, rel=1e-5)
    assert first.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
