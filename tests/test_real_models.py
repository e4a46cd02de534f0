"""The matrix and each step on pretrained models, where they are: PREFOPT_REAL_MODELS names a folder of model folders.

    PREFOPT_REAL_MODELS=models python -m pytest tests/test_real_models.py

SmolLM2-135M-Instruct and Gemma-3-270m are what it was run with.
"""

import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from trl.trainer.utils import add_fused_lm_head

from prefopt import PPOPtxConfig, PPOPtxTrainer, load_reward_model
from prefopt.inference.generate import end_token_ids, generate
from prefopt.inference.jsonl import write_jsonl
from prefopt.models.loading import load_language_model
from prefopt.models.reward import keep_4bit_gradients, sequence_scores
from prefopt.rankings.tokens import build_ids
from prefopt.recipes import sft
from tests.test_matrix import DTYPES, LANGUAGE, SCALAR, autocast_in, check_padding, padded
from tests.trainers.conftest import CLASSES, settings

FOLDER = os.environ.get("PREFOPT_REAL_MODELS")
MODELS = sorted(path.parent for path in Path(FOLDER).glob("*/config.json")) if FOLDER else []
pytestmark = [
    pytest.mark.skipif(not MODELS, reason="PREFOPT_REAL_MODELS names no folder of pretrained models"),
    pytest.mark.timeout(1800),
]

TEXTS = [
    "The cat sat on the mat and looked at the dog.",
    "Paris is",
    "Water boils at one hundred degrees, which is why the kettle whistles after a few minutes on the stove.",
]
QUESTIONS = ["What is the capital of France?", "Name a color."]
RANKED = [
    {"prompt": f"Question: {q}\nAnswer:", "completions": [" Paris.", " A cat, perhaps.", " No."], "ranks": [1, 2, 3]}
    for q in QUESTIONS
]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}


@pytest.fixture(params=MODELS or ["none"], ids=lambda path: Path(path).name)
def model_folder(request):
    torch.manual_seed(0)
    return str(request.param)


def two_steps(tmp_path, **options):
    return settings(
        tmp_path / "run",
        max_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        per_device_train_batch_size=2,
        **options,
    )


def ranked_trainer(kind, model_folder, tmp_path, **options):
    trainer, config = CLASSES[kind]
    return trainer(
        model_folder,
        args=config(**two_steps(tmp_path, **options)),
        train_dataset=Dataset.from_list(RANKED),
        peft_config=LoraConfig(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", **LORA),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def in_dtype(auto, model_folder, dtype):
    options = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    if dtype == "4-bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    torch.manual_seed(0)  # of a new head
    model = auto.from_pretrained(model_folder, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, **options)
    keep_4bit_gradients(model)
    if auto is AutoModelForCausalLM:
        add_fused_lm_head(model)
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_padded_batches_equal_single_rows(model_folder, dtype):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    for auto, read in ((AutoModelForCausalLM, LANGUAGE), (AutoModelForSequenceClassification, SCALAR)):
        model = in_dtype(auto, model_folder, dtype)
        exact = in_dtype(auto, model_folder, "fp32") if dtype in ("bf16", "autocast") else None
        for role in read:
            check_padding(role, model, exact, rows, dtype, relative=1e-5)


def test_sft_teaches_where_to_end(model_folder, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": " I do not know."} for row in RANKED]
    write_jsonl(tmp_path / "rows.jsonl", rows * 8)
    keys = settings(tmp_path / "run", max_steps=16, learning_rate=1e-3, per_device_train_batch_size=4)
    keys |= {"model_name_or_path": model_folder, "dataset_name": tmp_path / "rows.jsonl", "dtype": "float32"}
    keys |= {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear", "gradient_checkpointing": False}
    sft.main([text for key, value in keys.items() for text in (f"--{key}", str(value))])
    model, tokenizer = load_language_model(tmp_path / "run")
    ends = end_token_ids(model, tokenizer)
    for (drawn,) in generate(model, tokenizer, [row["prompt"] for row in RANKED] * 4, max_new_tokens=24):
        assert drawn.ids[-1] in ends
        assert not drawn.truncated
        assert tokenizer.convert_ids_to_tokens(drawn.ids[-1]) not in drawn.text


@pytest.mark.parametrize("bf16", [False, True])
def test_a_reward_model_is_saved_and_scores_as_trained(bf16, model_folder, tmp_path):
    trainer = ranked_trainer("reward", model_folder, tmp_path, bf16=bf16)
    trainer.train()
    assert logged(trainer, "loss")[0] < 1.2  # log 2 on average, whatever the scale of the hidden states
    # What differs by rounding alone does not stop prefix sharing.
    assert trainer._prefixes.is_on
    texts = [row["prompt"] for row in RANKED], [row["completions"][0] for row in RANKED]
    trained = trainer.score(*texts)
    trainer.save_model()
    rows = [x + y for x, y in (build_ids(trainer.processing_class, *text) for text in zip(*texts, strict=True))]
    with torch.no_grad(), autocast_in("autocast" if bf16 else "fp32"):
        loaded = sequence_scores(load_reward_model(tmp_path / "run"), *padded(rows, "right"))
    assert loaded.tolist() == pytest.approx(trained, abs=1e-4)


def test_dpo_starts_at_its_reference(model_folder, tmp_path):
    trainer = ranked_trainer("dpo", model_folder, tmp_path)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert losses[1] < losses[0]
    trainer.save_model()
    ids = torch.tensor([trainer.processing_class(TEXTS[0])["input_ids"]])
    model, _ = load_language_model(tmp_path / "run", dtype="float32")
    with torch.no_grad():
        trained, loaded = (m.eval()(input_ids=ids, use_cache=False).logits for m in (trainer.model, model))
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_ppo_ptx_starts_at_its_reference_and_stays_there_at_learning_rate_0(bf16, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    args = PPOPtxConfig(
        **two_steps(tmp_path, max_completion_length=8, ptx_max_length=64, ptx_batch_ratio=0.5, bf16=bf16)
        | {"learning_rate": 0.0}
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", **LORA)
    trainer = PPOPtxTrainer(
        model_folder,
        lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        args,
        Dataset.from_list([{"prompt": row["prompt"]} for row in RANKED]),
        processing_class=tokenizer,
        peft_config=adapter,
        pretrain_dataset=Dataset.from_list([{"text": " ".join(TEXTS)}] * 16),
    )
    trainer.train()
    assert logged(trainer, "objective/kl") == pytest.approx([0.0, 0.0], abs=1e-5)
    assert logged(trainer, "clip_ratio/region_mean") == [0.0, 0.0]
    assert min(logged(trainer, "grad_norm/ppo") + logged(trainer, "grad_norm/ptx")) > 0
    # Text as the model was pretrained on it: without its BOS, Gemma 3 reads it a nat worse.
    assert logged(trainer, "loss/ptx")[0] < 5.0
