"""Both ranked trainers: prefix sharing, several forwards, accumulation and processes change nothing but the cost."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from prefopt.models.passes import backbone
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.trainers.dpo.trainer import RankedDPOTrainer
from tests.trainers.conftest import CLASSES, in_two_processes, settings

pytestmark = pytest.mark.slow

WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to", "red", "house"]
QUESTION = "question: what is this? answer: the"


def completions(count, start=0):
    """Different texts of 2 to 5 words, of which many begin alike."""
    numbers = range(5 * start, 5 * start + count)
    return [f" {WORDS[i // 7 % 11]} {WORDS[i % 7]}" + " a" * (i % 4) for i in numbers]


ROWS = [
    {"prompt": "the cat", "completions": completions(3), "ranks": [2, 1, 3]},
    {"prompt": QUESTION, "completions": completions(2, 1), "ranks": [2, 1]},
    {"prompt": "the dog", "completions": completions(5, 2), "ranks": [1, 2, 2, 3, 1]},
    {"prompt": "a", "completions": completions(4, 3), "ranks": [1, 1, 2, 3]},
    {"prompt": QUESTION * 2, "completions": completions(9, 4), "ranks": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
    {"prompt": "is this a dog?", "completions": completions(2, 5), "ranks": [1, 2]},
    {"prompt": "red " * 9, "completions": completions(3, 6), "ranks": [3, 1, 2]},
    {"prompt": QUESTION + " cat", "completions": completions(6, 7), "ranks": [1, 2, 2, 2, 3, 3]},
]
MANY = [{"prompt": QUESTION, "completions": completions(64), "ranks": [1 + i % 30 for i in range(64)]}]
VOLATILE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = sorted(model.named_parameters())
        self.steps.append(torch.cat([p.grad.flatten().clone() for _, p in parameters if p.grad is not None]))


class Forwards:
    """Counts the tokens and rows of every forward of a model."""

    def __init__(self, model):
        self.sizes = []
        backbone(model).register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.sizes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))


def trainer_on(kind, model, tokenizer, tmp_path, rows=ROWS, adapter=False, **overrides):
    trainer, config = CLASSES[kind]
    defaults = {
        "per_device_train_batch_size": len(rows),
        "per_device_eval_batch_size": len(rows),
        "logging_steps": 1,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "gradient_checkpointing": False,
        **({"beta": 0.3} if kind == "dpo" else {}),
    }
    peft_config = None
    if adapter:
        peft_config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=8, init_lora_weights=False
        )
        torch.manual_seed(7)
    return trainer(
        model=copy.deepcopy(model),
        args=config(**settings(tmp_path, **{**defaults, **overrides})),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def moved(trainer):
    """DPO's policy away from its reference, where its rewards are all 0."""
    if isinstance(trainer, RankedDPOTrainer):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in sorted(trainer.model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def train(trainer):
    """The gradients and the logs of every step."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    moved(trainer).train()
    logs = [{n: x for n, x in log.items() if n not in VOLATILE} for log in trainer.state.log_history]
    return gradients.steps, logs


def assert_same(result, expected):
    """fp32: gradients within 1e-5 of their norm, the loss within 1e-6, all logs within rounding."""
    (gradients, logs), (expected_gradients, expected_logs) = result, expected
    assert len(gradients) == len(expected_gradients) > 0
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert b.norm() > 1e-2
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(logs, expected_logs, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
        if "loss" in b:
            assert abs(a["loss"] - b["loss"]) <= 1e-6 * max(1, abs(b["loss"]))


CASES = {
    "reward": ("reward", {}),
    "reward, ties half": ("reward", {"ties": "half", "label_smoothing": 0.1}),
    "reward, centered": ("reward", {"center_rewards_coefficient": 0.3}),
    "reward, Plackett-Luce": ("reward", {"loss_type": "plackett_luce"}),
    "reward, IPO, ties half": ("reward", {"loss_type": "ipo", "ties": "half"}),
    "reward, reentrant checkpointing": (
        "reward",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "reward, LoRA, checkpointing": ("reward", {"adapter": True, "gradient_checkpointing": True}),
    "reward, token": ("reward", {"reward_token": "<|reward|>"}),
    "dpo": ("dpo", {}),
    "dpo, two losses, centered": (
        "dpo",
        {
            "loss_type": ["sigmoid", "ipo"],
            "loss_weights": [1.0, 0.01],
            "center_rewards_coefficient": 0.3,
            "sft_coef": 0.1,
        },
    ),
    "dpo, Plackett-Luce": ("dpo", {"loss_type": "plackett_luce"}),
    "dpo, ties half": ("dpo", {"ties": "half", "loss_type": "hinge"}),
    "dpo, LoRA, checkpointing": ("dpo", {"adapter": True, "gradient_checkpointing": True}),
    "dpo, precomputed": ("dpo", {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_sharing_and_splitting_change_nothing(case, models, tokenizer, tmp_path):
    kind, overrides = CASES[case]
    expected = None
    ways = [
        {"prefix_sharing": False},
        {},
        {"max_tokens_per_forward": 60},
    ]  # some prompts together, some divided
    if case in ("reward", "dpo"):
        ways += [{"max_tokens_per_forward": 90}, {"max_tokens_per_forward": 60, "prefix_sharing": False}]
        ways += [{"max_tokens_per_forward": 1}]  # every completion alone
    for options in ways:
        trainer = trainer_on(kind, models[kind], tokenizer, tmp_path, **overrides, **options)
        forwards = Forwards(trainer.model)
        result = train(trainer)
        assert trainer._prefixes.is_on is options.get("prefix_sharing", True)
        if expected is None:
            expected = result
            continue
        assert_same(result, expected)
        if "max_tokens_per_forward" in options:
            assert len(forwards.sizes) >= 3


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "plackett_luce"])
def test_64_completions(kind, loss_type, models, tokenizer, tmp_path):
    results = [
        train(trainer_on(kind, models[kind], tokenizer, tmp_path, rows=MANY, loss_type=loss_type, **options))
        for options in ({"prefix_sharing": False}, {}, {"max_tokens_per_forward": 70})
    ]
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_evaluation_and_scores_do_not_change(kind, models, tokenizer, tmp_path):
    expected = None
    for options in (
        {"prefix_sharing": False},
        {},
        {"max_tokens_per_forward": 30},
        {"max_tokens_per_forward": 30, "prefix_sharing": False, "per_device_eval_batch_size": 3},
    ):
        trainer = moved(trainer_on(kind, models[kind], tokenizer, tmp_path, **options))
        metrics = trainer.evaluate()
        metrics = {n: x for n, x in metrics.items() if not n.endswith(("runtime", "per_second", "_time"))}
        pairs = [(row["prompt"], text) for row in reversed(ROWS) for text in row["completions"]]
        scores = trainer.score(*zip(*pairs, strict=True))
        if expected is None:
            expected = metrics, scores
            predictions = trainer.predict(trainer.eval_dataset).predictions
            rows = [row[: len(r["ranks"])].tolist() for row, r in zip(predictions, ROWS, strict=True)]
            assert scores == pytest.approx([x for row in rows[::-1] for x in row], abs=1e-5)
        assert metrics == pytest.approx(expected[0], abs=1e-5)
        assert abs(metrics["eval_loss"] - expected[0]["eval_loss"]) < 1e-6 * max(1, metrics["eval_loss"])
        assert scores == pytest.approx(expected[1], abs=1e-5)
        assert len({round(x, 3) for x in scores}) > 10


def test_only_texts_are_scored(reward_model, tokenizer, tmp_path):
    trainer = trainer_on("reward", reward_model, tokenizer, tmp_path)
    for texts in (("ab", ["cd", "ef"]), (["ab"], {"c": "d"})):
        with pytest.raises(TypeError, match="expected a list of texts or messages"):
            trainer.score(*texts)
    for prompt, completion, field in (
        (None, " a", "prompt"),
        ("", " a", "prompt"),
        ("a", 7, "completion"),
        ("a", "", "completion"),
    ):
        with pytest.raises(ValueError, match=f"score row 1: field '{field}': expected"):
            trainer.score(["the cat", prompt], [" sat", completion])
    texts = ["the cat", "a"], [" sat", " dog"]
    assert trainer.score(*map(iter, texts)) == trainer.score(*texts)


@pytest.mark.parametrize(("ties", "expected"), [("drop", [0, 0, 1, 1]), ("half", [0, 1, 1, 1])])
def test_prompts_that_compare_something_are_counted(ties, expected, reward_model, tokenizer, tmp_path):
    trainer = trainer_on("reward", reward_model, tokenizer, tmp_path, ties=ties)
    ranks = torch.tensor([[1, 0, 0], [1, 1, 0], [2, 1, 0], [1, 2, 2]])
    assert trainer._counted(ranks).int().tolist() == expected
    per_prompt = torch.tensor([0.0, 3.0 * expected[1], 5.0, 7.0])
    mean = trainer._mean_over_prompts(per_prompt, {"ranks": ranks})
    assert mean.item() == pytest.approx(per_prompt.sum().item() / sum(expected), abs=1e-6)


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_step_by_itself_is_the_mean_over_its_batch(kind, budget, models, tokenizer, tmp_path):
    trainer = moved(trainer_on(kind, models[kind], tokenizer, tmp_path, max_tokens_per_forward=budget))
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)).item()
    loss = trainer.training_step(trainer.model, inputs).item()
    assert loss == pytest.approx(expected, abs=1e-6)
    (logged,) = train(trainer_on(kind, models[kind], tokenizer, tmp_path, max_tokens_per_forward=budget))[1][:1]
    assert logged["loss"] == pytest.approx(expected, abs=1e-6)


# ---- the budget ----

SMALL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}


def other_model(kind, model_type):
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if kind == "reward" else {}
    return auto.from_config(AutoConfig.for_model(model_type, **SMALL, **labels))


@pytest.mark.parametrize(
    ("kind", "what"),
    [(kind, what) for kind in ("reward", "dpo") for what in ("shared", "rows", "falls back")] + [("reward", "token")],
)
def test_no_forward_exceeds_the_budget(what, kind, models, tokenizer, tmp_path):
    budget = 60
    trainer = trainer_on(
        kind,
        other_model(kind, "stablelm") if what == "falls back" else models[kind],
        tokenizer,
        tmp_path,
        prefix_sharing=what != "rows",
        max_tokens_per_forward=budget,
        **({"reward_token": "<|reward|>"} if what == "token" else {}),
    )
    forwards = Forwards(trainer.model)
    train(trainer)
    trainer.evaluate()
    trainer.score([ROWS[4]["prompt"]] * 9, ROWS[4]["completions"])
    assert len(forwards.sizes) > 6
    packed = [size for size in forwards.sizes if size[0] == 1]
    assert all(rows * width <= budget for rows, width in forwards.sizes if rows > 1)
    assert all(width <= budget for _, width in packed)  # no single completion is longer
    assert any(rows > 1 for rows, _ in forwards.sizes) or what == "shared"
    assert max(rows * width for rows, width in forwards.sizes) > budget / 2


def test_a_budget_without_room_for_a_completion_forwards_it_whole(reward_model, tokenizer, tmp_path):
    trainer = trainer_on("reward", reward_model, tokenizer, tmp_path, max_tokens_per_forward=1)
    forwards = Forwards(trainer.model)
    trainer.evaluate()
    assert len(forwards.sizes) == sum(len(row["ranks"]) for row in ROWS)
    assert all(rows == 1 for rows, _ in forwards.sizes)


# ---- accumulation ----


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize(("batch_size", "steps", "budget"), [(1, 8, None), (3, 3, None), (2, 4, 40), (3, 3, 40)])
def test_accumulated_batches_equal_one(batch_size, steps, budget, kind, models, tokenizer, tmp_path):
    def result(size, steps, **options):
        trainer = trainer_on(
            kind,
            models[kind],
            tokenizer,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            ties="half",
            **options,
        )
        gradients, logs = train(trainer)
        means = ("min_reward", "max_reward")  # of a batch, averaged over batches
        return gradients, [{n: x for n, x in log.items() if n not in means} for log in logs]

    assert_same(result(batch_size, steps, max_tokens_per_forward=budget), result(8, 1))


@pytest.mark.parametrize("budget", [None, 40])
def test_the_last_step_of_an_epoch_has_fewer_prompts(budget, reward_model, tokenizer, tmp_path):
    def result(size, steps, **options):
        trainer = trainer_on(
            "reward",
            reward_model,
            tokenizer,
            tmp_path,
            rows=ROWS[:5],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=-1,
            num_train_epochs=1,
            **options,
        )
        gradients, logs = train(trainer)
        means = ("min_reward", "max_reward", "epoch")
        return gradients, [{n: x for n, x in log.items() if n not in means} for log in logs]

    expected = result(4, 1)
    assert len(expected[0]) == 2
    assert_same(result(2, 2, max_tokens_per_forward=budget), expected)
    assert_same(result(1, 4, max_tokens_per_forward=budget), expected)


# ---- the check on the first batch ----


def warnings_about_sharing(caplog):
    return [record for record in caplog.records if "Prefix sharing is off" in record.message]


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_an_architecture_wrongly_on_the_list_is_caught(kind, tokenizer, tmp_path, monkeypatch, caplog):
    """StableLM does not pass the layout on to its attention: without an error, completions see each other."""
    monkeypatch.setattr(prefix_sharing, "MODEL_TYPES", {*prefix_sharing.MODEL_TYPES, "stablelm"})
    model = other_model(kind, "stablelm")
    assert prefix_sharing.why_not(model) is None
    expected = train(trainer_on(kind, model, tokenizer, tmp_path, prefix_sharing=False, max_steps=2))
    assert not warnings_about_sharing(caplog)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_on(kind, model, tokenizer, tmp_path, max_steps=2)
        result = train(trainer)
    assert_same(result, expected)
    assert not trainer._prefixes.is_on
    (warning,) = warnings_about_sharing(caplog)
    assert "two batches scored differently" in warning.message
    monkeypatch.setattr(prefix_sharing.PrefixSharing, "is_equal", lambda *_: True)
    wrong = train(trainer_on(kind, model, tokenizer, tmp_path, max_steps=2))
    assert (wrong[0][0] - expected[0][0]).norm() > 0.1 * expected[0][0].norm()  # as it would be without the check


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize("model_type", ["nemotron", "stablelm"])
def test_other_architectures_fall_back_with_one_warning(model_type, kind, tokenizer, tmp_path, caplog):
    model = other_model(kind, model_type)
    expected = train(trainer_on(kind, model, tokenizer, tmp_path, prefix_sharing=False, max_steps=2))
    with caplog.at_level(logging.WARNING):
        result = train(trainer_on(kind, model, tokenizer, tmp_path, max_steps=2))
    assert_same(result, expected)
    (warning,) = warnings_about_sharing(caplog)
    assert repr(model_type) in warning.message


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_check_leaves_no_trace(kind, training, tokenizer, tmp_path):
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if kind == "reward" else {}
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 1}
    drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "pad_token_id": 0}
    model = auto.from_config(AutoConfig.for_model("gpt2", **shape, **drops, **labels))
    trainer = trainer_on(kind, model, tokenizer, tmp_path, disable_dropout=False)
    trainer.model.train(training)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    hooks = [len(module._forward_pre_hooks) for module in trainer.model.modules()]

    def loss(unchecked):
        trainer._prefixes.proved = set() if unchecked else {id(trainer.model), id(getattr(trainer, "ref_model", None))}
        torch.manual_seed(3)
        with torch.set_grad_enabled(training):
            value = trainer.compute_loss(trainer.model, inputs)
        assert id(trainer.model) in trainer._prefixes.proved
        return value, torch.get_rng_state()

    first, state = loss(True)
    second, same_state = loss(False)
    assert torch.equal(first, second)
    assert torch.equal(state, same_state)
    assert modes == {name: module.training for name, module in trainer.model.named_modules()}
    assert all(p.grad is None for p in trainer.model.parameters())
    assert first.requires_grad is training
    assert hooks == [len(module._forward_pre_hooks) for module in trainer.model.modules()]


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_bf16_keeps_sharing(kind, models, tokenizer, tmp_path, monkeypatch, caplog):
    """What differs by no more than rows do from rows is rounding; accelerate's autocast is inside the model's forward."""
    is_equal = prefix_sharing.PrefixSharing.is_equal
    name = "scores" if kind == "reward" else "log_probs"

    def moved(by):
        def check(self, model, rows):
            read = self.read

            def noisy(model, rows):
                values = read(model, rows)
                return values | {name: values[name] * (1 + 0.05 * by(rows)) + 0.05 * by(rows)}

            with monkeypatch.context() as patch:
                patch.setattr(self, "read", noisy)
                return is_equal(self, model, rows)

        return check

    # Rows move as soon as they are padded.
    monkeypatch.setattr(prefix_sharing.PrefixSharing, "is_equal", moved(lambda rows: len(rows.prompts) > 1))
    trainer = trainer_on(kind, models[kind], tokenizer, tmp_path, bf16=True)
    (gradient,), _ = train(trainer)
    assert trainer._prefixes.is_on
    exact = train(trainer_on(kind, models[kind], tokenizer, tmp_path, prefix_sharing=False))[0][0]
    rows = train(trainer_on(kind, models[kind], tokenizer, tmp_path, prefix_sharing=False, bf16=True))[0][0]
    assert (gradient - exact).norm() <= 2 * (rows - exact).norm()
    assert (rows - exact).norm() <= 0.1 * exact.norm()
    # So much may shared ones, too, whichever way.
    ways = moved(lambda rows: (len(rows.prompts) > 1) * (1 if rows.packed is None else -1))
    monkeypatch.setattr(prefix_sharing.PrefixSharing, "is_equal", ways)
    trainer = trainer_on(kind, models[kind], tokenizer, tmp_path, max_steps=2)
    train(trainer)
    assert trainer._prefixes.is_on
    # Where only shared ones do, it is no rounding; one batch alone proves nothing.
    monkeypatch.setattr(prefix_sharing.PrefixSharing, "is_equal", moved(lambda rows: rows.packed is not None))
    for steps, is_on in ((1, True), (2, False)):
        doubted = trainer_on(kind, models[kind], tokenizer, tmp_path, max_steps=steps)
        train(doubted)
        assert doubted._prefixes.is_on is is_on


# ---- two processes ----


def train_every_kind(folder, tokenizer, batch_size, rows):
    """Logs, metrics and weights of each; the main process writes them."""
    results = {}
    texts = Dataset.from_list([{"text": row["prompt"]} for row in rows])
    for kind, budget, adapter in (
        ("reward", None, False),
        ("reward", 40, False),
        ("reward", 40, True),
        ("dpo", None, True),
        ("dpo", 40, False),
    ):
        has_text = (kind, budget) == ("dpo", 40)
        of_text = {"ptx_coef": 0.3, "ptx_max_length": 8, "ptx_batch_ratio": 0.4, "sft_coef": 0.1} if has_text else {}
        model_class = LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM
        trainer_class, config = CLASSES[kind]
        args = config(
            output_dir=str(folder / "out"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            save_strategy="no",
            logging_steps=1,
            ties="half",
            per_device_eval_batch_size=batch_size,
            max_tokens_per_forward=budget,
            gradient_checkpointing=adapter,
            **of_text,
        )
        trainer = trainer_class(
            model=model_class.from_pretrained(folder / kind, dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:13]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None,
            **({"pretrain_dataset": texts} if has_text else {}),
        )
        trainer.train()
        logs, metrics = [kept(log) for log in trainer.state.log_history], trainer.evaluate()
        weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
        results[kind, budget, adapter] = {"logs": logs, "metrics": kept(metrics), "weights": weights}
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / f"{trainer.accelerator.num_processes}.pt")


def kept(log):
    return {name: x for name, x in log.items() if not name.endswith(("runtime", "second", "flos", "_time"))}


def test_two_processes_equal_one(models, tokenizer, tmp_path):
    """At the same global batch, though the two differ in their numbers of completions, of tokens and of forwards."""
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    # No row stands twice: rounding would move equal confidences apart, over the edge of a bin of the calibration error.
    rows = [*ROWS, *({**row, "prompt": "the " + row["prompt"]} for row in ROWS[::-1])]
    train_every_kind(tmp_path, tokenizer, 4, rows)
    in_two_processes(train_every_kind, tmp_path, tokenizer, 2, rows)
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    for case, expected in one.items():
        result = two[case]
        for a, b in zip(result["logs"], expected["logs"], strict=True):
            assert a == pytest.approx(b, abs=1e-5, rel=1e-4), case
        # Thirteen rows: accelerate fills the last batch with repeated ones, which must not count.
        assert len(expected["metrics"]) > 8
        assert result["metrics"] == pytest.approx(expected["metrics"], abs=1e-5, rel=1e-4), case
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-6, msg=f"{case} {name}")
