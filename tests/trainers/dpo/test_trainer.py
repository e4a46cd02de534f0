"""RankedDPOTrainer against TRL's DPOTrainer and against slow loops, with every kind of reference."""

import copy
import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

from prefopt.rankings.tokens import build_ids
from prefopt.trainers.dpo.config import HONORED, REFUSED, RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOCollator, RankedDPOTrainer
from tests.trainers.conftest import PAIRS, RAGGED, first_loss, lora, shape_of_one_forward
from tests.trainers.dpo.conftest import BETA, config

pytestmark = pytest.mark.slow

REFERENCES = ["model", "in_memory", "adapter_off", "ref_adapter", "precomputed", "precomputed_adapter"]


def trainer_on(model, rows, tokenizer, tmp_path, eval_rows=None, cls=RankedDPOTrainer, **overrides):
    given = {name: overrides.pop(name) for name in ("ref_model", "peft_config") if name in overrides}
    return cls(
        model=model,
        args=config(tmp_path, RankedDPOConfig if cls is RankedDPOTrainer else DPOConfig, **overrides),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        **given,
    )


def perturb(model, seed, pattern="", std=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if pattern in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def setting(kind, base, tmp_path, cls=RankedDPOTrainer, rows=RAGGED, tokenizer=None, **overrides):
    """A trainer whose policy has moved away from its reference, and that reference as a plain model."""
    if kind == "model":
        trainer = trainer_on(
            perturb(copy.deepcopy(base), 1),
            rows,
            tokenizer,
            tmp_path,
            cls=cls,
            ref_model=copy.deepcopy(base),
            **overrides,
        )
        return trainer, base
    if kind == "in_memory":
        trainer = trainer_on(copy.deepcopy(base), rows, tokenizer, tmp_path, cls=cls, **overrides)
        perturb(trainer.model, 1)
        return trainer, base
    if kind == "precomputed":
        trainer = trainer_on(
            copy.deepcopy(base),
            rows,
            tokenizer,
            tmp_path,
            cls=cls,
            precompute_ref_log_probs=True,
            **overrides,
        )
        perturb(trainer.model, 1)
        return trainer, base
    if kind == "adapter_off":
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        trainer = trainer_on(
            copy.deepcopy(base), rows, tokenizer, tmp_path, cls=cls, peft_config=peft_config, **overrides
        )
        perturb(trainer.model, 1, "lora_B", 0.3)
        return trainer, base
    model = lora(copy.deepcopy(base), "CAUSAL_LM")
    reference = copy.deepcopy(model).merge_and_unload()
    precompute = kind == "precomputed_adapter"
    trainer = trainer_on(model, rows, tokenizer, tmp_path, cls=cls, precompute_ref_log_probs=precompute, **overrides)
    perturb(trainer.model, 1, "lora_B.default", 0.3)
    return trainer, reference


def logp_by_hand(model, tokenizer, prompt, completion):
    """Slow reference: one row, no padding, token by token."""
    prompt_ids, completion_ids = build_ids(tokenizer, prompt, completion)
    ids = prompt_ids + completion_ids
    logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prompt_ids), len(ids)))


def scores_by_hand(policy, reference, tokenizer, row):
    scores = []
    for completion in row["completions"]:
        with torch.no_grad():
            reference_logp = logp_by_hand(reference, tokenizer, row["prompt"], completion)
        scores.append(BETA * (logp_by_hand(policy, tokenizer, row["prompt"], completion) - reference_logp))
    return scores


def strict(ranks):
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def loss_by_hand(policy, reference, tokenizer, rows):
    """Eq. 7 as loops: pairs of a prompt, then prompts."""
    per_prompt = []
    for row in rows:
        scores = scores_by_hand(policy, reference, tokenizer, row)
        losses = [-torch.nn.functional.logsigmoid(scores[i] - scores[j]) for i, j in strict(row["ranks"])]
        per_prompt.append(sum(losses) / len(losses))
    return sum(per_prompt) / len(per_prompt)


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", [kind for kind in REFERENCES if kind != "in_memory"])
def test_equals_trl_on_pairs(kind, causal_lm, tokenizer, tmp_path):
    """Without `in_memory`, which plain TRL cannot do."""
    ours, _ = setting(kind, causal_lm, tmp_path, rows=PAIRS, tokenizer=tokenizer)
    theirs, _ = setting(kind, causal_lm, tmp_path, cls=DPOTrainer, rows=PAIRS, tokenizer=tokenizer)
    theirs.model.load_state_dict(ours.model.state_dict())
    our_loss, their_loss = first_loss(ours), first_loss(theirs)
    torch.testing.assert_close(our_loss, their_loss, rtol=0, atol=1e-6)
    assert abs(our_loss.item() - torch.tensor(2.0).log().item()) > 1e-3  # policy and reference differ
    our_loss.backward()
    their_loss.backward()
    our_weights, their_weights = trainable(ours.model), trainable(theirs.model)
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        torch.testing.assert_close(weight.grad, their_weights[name].grad, rtol=0, atol=1e-5, msg=name)
    assert max(weight.grad.abs().max() for weight in our_weights.values()) > 1e-3
    our_logs, their_logs = {}, {}
    ours.log(our_logs)
    theirs.log(their_logs)
    assert our_logs.keys() == their_logs.keys() | {"kendall_tau", "gradient_weight"}
    for key, value in their_logs.items():
        assert our_logs[key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.parametrize("kind", REFERENCES)
def test_rankings_equal_a_loop_over_pairs(kind, causal_lm, tokenizer, tmp_path):
    trainer, reference = setting(kind, causal_lm, tmp_path, tokenizer=tokenizer)
    expected = loss_by_hand(trainer.model, reference, tokenizer, RAGGED)
    weights = trainable(trainer.model)
    expected_grads = torch.autograd.grad(expected, list(weights.values()))
    loss = first_loss(trainer)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward()
    for (name, weight), gradient in zip(weights.items(), expected_grads, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", REFERENCES)
def test_first_score_is_zero_and_the_reference_stays(kind, causal_lm, tokenizer, tmp_path):
    """Before any step, policy and reference are the same model; afterwards only the policy has moved."""
    if kind == "model":
        trainer = trainer_on(causal_lm, RAGGED, tokenizer, tmp_path, ref_model=copy.deepcopy(causal_lm))
    elif kind in ("ref_adapter", "precomputed_adapter"):
        precompute = kind == "precomputed_adapter"
        trainer = trainer_on(
            lora(causal_lm, "CAUSAL_LM"), RAGGED, tokenizer, tmp_path, precompute_ref_log_probs=precompute
        )
    else:
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=4) if kind == "adapter_off" else None
        trainer = trainer_on(
            causal_lm,
            RAGGED,
            tokenizer,
            tmp_path,
            peft_config=peft_config,
            precompute_ref_log_probs=kind == "precomputed",
        )
    inputs = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert outputs["scores"].abs().max() < 1e-5
    assert not any("ref" in name for name in trainable(trainer.model))
    reference = inputs.get("ref_logps")
    if reference is None:
        reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
    trainer.args.max_steps = 2
    trainer.args.learning_rate = 1e-2
    trainer.train()
    _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert outputs["scores"].abs().max() > 1e-3
    if "ref_logps" not in inputs:
        after = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
        torch.testing.assert_close(after, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("precompute", [False, True])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size, precompute, causal_lm, tokenizer, tmp_path):
    trainer = trainer_on(
        copy.deepcopy(causal_lm),
        RAGGED,
        tokenizer,
        tmp_path,
        eval_rows=RAGGED,
        per_device_eval_batch_size=batch_size,
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=3,
    )
    perturb(trainer.model, 1)
    metrics = trainer.evaluate()
    with torch.no_grad():
        loss = loss_by_hand(trainer.model, causal_lm, tokenizer, RAGGED).item()
        rows = [[score.item() for score in scores_by_hand(trainer.model, causal_lm, tokenizer, row)] for row in RAGGED]
    pairs = [(scores[i], scores[j]) for scores, row in zip(rows, RAGGED, strict=True) for i, j in strict(row["ranks"])]
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["eval_rewards/chosen"] == pytest.approx(sum(w for w, _ in pairs) / len(pairs), abs=1e-5)
    assert metrics["eval_rewards/rejected"] == pytest.approx(sum(x for _, x in pairs) / len(pairs), abs=1e-5)
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(w - x for w, x in pairs) / len(pairs), abs=1e-5)
    accuracy = sum(w > x for w, x in pairs) / len(pairs)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(accuracy, abs=1e-6)
    assert 0 < accuracy < 1


def test_reference_values_in_the_rows_are_used_only_if_precomputed(causal_lm, tokenizer, tmp_path):
    """They may be those of another trainer's reference."""
    first, _ = setting("precomputed", causal_lm, tmp_path, tokenizer=tokenizer)
    rows = [{**row, "ref_logps": [7.0] * len(row["ranks"])} for row in first.train_dataset]
    trainer = trainer_on(perturb(copy.deepcopy(causal_lm), 2), rows, tokenizer, tmp_path)
    loss, outputs = trainer.compute_loss(
        trainer.model, trainer.data_collator(list(trainer.train_dataset)), return_outputs=True
    )
    assert outputs["scores"].abs().max() < 1e-5
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)


def test_evaluating_a_new_set_after_precomputing(causal_lm, tokenizer, tmp_path):
    trainer = trainer_on(copy.deepcopy(causal_lm), RAGGED, tokenizer, tmp_path, precompute_ref_log_probs=True)
    assert trainer.evaluate(Dataset.from_list(PAIRS))["eval_loss"] == pytest.approx(
        torch.tensor(2.0).log().item(), abs=1e-6
    )


def test_compute_metrics_gets_scores_and_ranks(causal_lm, tokenizer, tmp_path):
    seen = []
    trainer = trainer_on(causal_lm, RAGGED, tokenizer, tmp_path, eval_rows=RAGGED, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"mine": 7.0}
    assert trainer.evaluate()["eval_mine"] == 7.0
    ranks = [[rank for rank in row if rank > 0] for row in seen[0].label_ids.tolist()]
    assert ranks == [row["ranks"] for row in RAGGED]
    assert seen[0].predictions.shape == seen[0].label_ids.shape


@pytest.mark.parametrize("share", [True, False])
def test_every_token_is_forwarded_once(share, causal_lm, tokenizer, tmp_path):
    options = {"precompute_ref_log_probs": True, "prefix_sharing": share}
    trainer = trainer_on(causal_lm, RAGGED, tokenizer, tmp_path, **options)
    seen = []
    causal_lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    first_loss(trainer)
    assert seen == [shape_of_one_forward(trainer, share)]


def test_loss_does_not_depend_on_padding(causal_lm, tokenizer, tmp_path):
    losses = []
    for multiple in (None, 64):
        trainer, _ = setting("in_memory", causal_lm, tmp_path, tokenizer=tokenizer, pad_to_multiple_of=multiple)
        losses.append(first_loss(trainer))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)


def test_moe_auxiliary_loss_as_in_trl(tokenizer, tmp_path):
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=320,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
    )
    settings = {"rows": PAIRS, "tokenizer": tokenizer, "router_aux_loss_coef": 0.5}
    ours, _ = setting("model", base, tmp_path, **settings)
    theirs, _ = setting("model", base, tmp_path, cls=DPOTrainer, **settings)
    torch.testing.assert_close(first_loss(ours), first_loss(theirs), rtol=0, atol=1e-5)
    our_logs, their_logs = {}, {}
    ours.log(our_logs)
    theirs.log(their_logs)
    assert our_logs["aux_loss"] == pytest.approx(their_logs["aux_loss"], abs=1e-5)
    assert our_logs["aux_loss"] > 0.1


def test_synchronized_reference_follows_the_policy(causal_lm, tokenizer, tmp_path):
    trainer = trainer_on(
        causal_lm,
        RAGGED,
        tokenizer,
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        max_steps=1,
        learning_rate=1e-2,
    )
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    after, policy = trainer.ref_model.state_dict(), trainer.model.state_dict()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    for name in after:
        torch.testing.assert_close(after[name], policy[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_learns_saves_and_loads(kind, causal_lm, tokenizer, tmp_path):
    causal_lm.save_pretrained(tmp_path / "base")
    rows = [
        {"prompt": prompt, "completions": [f" {a} dog", f" {a} cat", f" {a} mat"], "ranks": [1, 2, 3]}
        for prompt in ("the", "what is this?", "a")
        for a in ("red", "the")
    ]
    lora_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    trainer = trainer_on(
        str(tmp_path / "base"),
        rows,
        tokenizer,
        tmp_path / "dpo",
        eval_rows=rows,
        learning_rate=2e-2,
        num_train_epochs=15,
        per_device_train_batch_size=3,
        peft_config=lora_config if kind == "lora" else None,
    )
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/accuracies"] > 0.99
    assert after["eval_loss"] < 0.3
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model.eval()(input_ids=ids).logits
    if kind == "lora":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "dpo")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    assert any("rewards/margins" in entry for entry in trainer.state.log_history)


def test_resumes_from_a_checkpoint(causal_lm, tokenizer, tmp_path):
    settings = {
        "precompute_ref_log_probs": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trainer_on(copy.deepcopy(causal_lm), RAGGED, tokenizer, tmp_path, **settings)
    whole.train()
    assert whole.state.global_step == 4
    resumed = trainer_on(copy.deepcopy(causal_lm), RAGGED, tokenizer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_chat_rows(causal_lm, chat_tokenizer, tmp_path):
    def message(role, content):
        return [{"role": role, "content": content}]

    rows = [
        {
            "prompt": message("user", "what is this?"),
            "completions": [message("assistant", text) for text in ("a dog", "the cat", "red")],
            "ranks": [2, 1, 3],
        }
    ]
    trainer = trainer_on(copy.deepcopy(causal_lm), rows, chat_tokenizer, tmp_path)
    perturb(trainer.model, 1)
    expected = loss_by_hand(trainer.model, causal_lm, chat_tokenizer, rows)
    torch.testing.assert_close(first_loss(trainer), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in REFERENCES if kind != "precomputed"])
def test_score_equals_single_row_evaluation(kind, causal_lm, tokenizer, tmp_path):
    """With `precomputed_adapter` the reference is computed from the frozen copy, which TRL keeps."""
    trainer, reference = setting(kind, causal_lm, tmp_path, tokenizer=tokenizer, per_device_eval_batch_size=3)
    prompts = [row["prompt"] for row in RAGGED for _ in row["completions"]]
    completions = [completion for row in RAGGED for completion in row["completions"]]
    trained = trainable(trainer.model).keys()
    trainer.model.train()
    scores = trainer.score(prompts, completions)
    assert trainer.model.training
    assert trainable(trainer.model).keys() == trained
    with torch.no_grad():
        expected = [
            score.item() for row in RAGGED for score in scores_by_hand(trainer.model, reference, tokenizer, row)
        ]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 1e-2
    assert trainer.score(prompts[::-1], completions[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert trainer.score([], []) == []


def test_score_of_chat(causal_lm, chat_tokenizer, tmp_path):
    prompt = [{"role": "user", "content": "what is this?"}]
    rows = [{"prompt": prompt, "completions": ["a dog", "the cat"], "ranks": [2, 1]}]
    rows[0]["completions"] = [[{"role": "assistant", "content": text}] for text in rows[0]["completions"]]
    trainer = trainer_on(copy.deepcopy(causal_lm), rows, chat_tokenizer, tmp_path)
    perturb(trainer.model, 1)
    with torch.no_grad():
        expected = [score.item() for score in scores_by_hand(trainer.model, causal_lm, chat_tokenizer, rows[0])]
    assert trainer.score([prompt] * 2, rows[0]["completions"]) == pytest.approx(expected, abs=1e-5)


def test_score_without_a_reference_is_refused(causal_lm, tokenizer, tmp_path):
    trainer, _ = setting("precomputed", causal_lm, tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no reference of a full model is kept"):
        trainer.score(["the cat"], [" sat"])
    trainer, _ = setting("precomputed_adapter", causal_lm, tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="got 1 prompts and 2 completions"):
        trainer.score(["the cat"], [" sat", " ran"])


def test_collator_carries_precomputed_references():
    batch = RankedDPOCollator(pad_token_id=0)(
        [
            {
                "prompt_ids": [5],
                "completion_ids": [[6], [7], [8]],
                "ranks": [1, 2, 3],
                "ref_logps": [-1.0, -2.0, -3.0],
            },
            {"prompt_ids": [5], "completion_ids": [[6], [7]], "ranks": [1, 2], "ref_logps": [-4.0, -5.0]},
        ]
    )
    assert batch["ref_logps"].tolist() == [[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]


def test_unsupported_models_are_refused(causal_lm, tokenizer, tmp_path):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="adds virtual tokens"):
        trainer_on(causal_lm, PAIRS, tokenizer, tmp_path, peft_config=peft_config)
    with pytest.raises(ValueError, match="merge its adapter"):
        trainer_on(copy.deepcopy(causal_lm), PAIRS, tokenizer, tmp_path, ref_model=lora(causal_lm, "CAUSAL_LM"))
    other_name = get_peft_model(copy.deepcopy(causal_lm), LoraConfig(task_type="CAUSAL_LM"), "mine")
    with pytest.raises(ValueError, match="active adapters are"):
        trainer_on(other_name, PAIRS, tokenizer, tmp_path)
    with pytest.raises(TypeError, match="must be a RankedDPOConfig"):
        RankedDPOTrainer(causal_lm, args=config(tmp_path, DPOConfig), processing_class=tokenizer)


def test_default_config_on_this_machine(tmp_path):
    args = RankedDPOConfig(output_dir=str(tmp_path))
    assert args.bf16 == torch.cuda.is_available()


def test_every_own_field_of_trl_is_decided():
    own = set(DPOConfig.__annotations__)
    assert own == set(HONORED) | set(REFUSED)
    assert not set(HONORED) & set(REFUSED)
    fields = {field.name: field for field in dataclasses.fields(DPOConfig)}
    for name, (allowed, _) in REFUSED.items():
        field = fields[name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert default == allowed, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncation_mode", "keep_end"),
        ("padding_free", True),
        ("ld_alpha", 0.5),
        ("use_weighting", True),
        ("discopop_tau", 0.1),
        ("pad_token", "<pad>"),
    ],
)
def test_refused_options_raise_with_the_reason(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported: "):
        config(tmp_path, **{name: value})


def test_model_card_names_the_paper(causal_lm, tokenizer, tmp_path):
    trainer = trainer_on(causal_lm, PAIRS, tokenizer, tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny-dpo")
    card = (tmp_path / "README.md").read_text()
    assert "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" in card
    assert "2305.18290" in card
    assert "- prefopt" in card
    assert "- trl" in card


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda lm, rm, args: {"model": rm}, "`model` is a LlamaForSequenceClassification, which predicts no tokens"),
        (lambda lm, rm, args: {"model": lm, "ref_model": rm}, "`ref_model` is a LlamaForSequenceClassification"),
        (lambda lm, rm, args: {"model": lm, "ref_model": args}, "the second place is the reference"),
        (lambda lm, rm, args: {"model": lm, "ref_model": "sft"}, "`ref_model` is 'sft': expected a model; load"),
        (lambda lm, rm, args: {"model": None}, "`model` is None: expected a path"),
    ],
    ids=["reward model", "reward model as reference", "args second", "reference as path", "no model"],
)  # fmt: skip
def test_models_of_the_wrong_kind_are_refused(given, expected, causal_lm, reward_model, tmp_path):
    args = RankedDPOConfig(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match=expected):
        RankedDPOTrainer(**{"args": args, **given(causal_lm, reward_model, args)})


def test_a_model_from_memory_needs_its_tokenizer(causal_lm, tmp_path):
    with pytest.raises(ValueError, match="pass `processing_class`"):
        RankedDPOTrainer(causal_lm, args=RankedDPOConfig(str(tmp_path), report_to="none", use_cpu=True))
