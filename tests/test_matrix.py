"""Every architecture x padding x dtype x role: what tiny fp32 models of one architecture cannot show.

Padded batches equal single rows within the model's own noise; before the first step the ratio is 1 and the KL 0, and at
learning rate 0 they stay so; a saved model scores as the trained one; shared prefixes equal rows. What is not supported
is refused with a sentence that stands here. The table in docs/architectures.md is made from this file:

    python -m tests.test_matrix
"""

import math
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl.trainer.utils import add_fused_lm_head

from prefopt import PPOPtxTrainer, load_reward_model
from prefopt.models.heads import completion_logps, logits_in_tiles, token_logps
from prefopt.models.loading import load_causal_lm
from prefopt.models.passes import is_random, padded_inputs
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.layout import Rows, pack
from prefopt.models.reward import keep_4bit_gradients, sequence_scores, token_scores
from prefopt.rankings.tokens import build_ids
from prefopt.trainers.ppo_ptx import episodes
from prefopt.trainers.ppo_ptx.episodes import Roles
from prefopt.trainers.ppo_ptx.roles import ValueFunction
from prefopt.trainers.shared.pretraining import pretraining_loss
from tests.trainers.conftest import CLASSES, RAGGED, settings
from tests.trainers.ppo_ptx.conftest import PROMPTS, TEXTS, config, logs_of

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
# With the dropout that their checkpoints have, or more.
ARCHITECTURES = {
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
        "attention_dropout": 0.1,
        "resid_dropout": 0.1,
    },
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1},
    "starcoder2": {"sliding_window": 5, "attention_dropout": 0.1, "residual_dropout": 0.1},
    "bloom": {"n_head": 4, "hidden_dropout": 0.1},
    "llama": {"attention_dropout": 0.1},
    "qwen3": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "mistral": {"sliding_window": 5},
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "gpt_oss": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**EXPERTS, **LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1},
}
# What is refused, or falls back to a row for each completion, with words of the sentence that says so.
NO_REWARD_MODEL = {"lfm2": "Unrecognized configuration class"}
NOT_SHARED = {name: f"not proved for the architecture '{name}'" for name in ("gpt_neo", "bloom", "qwen3_next", "lfm2")}
NOT_COMPARED = {"phimoe": ({"num_local_experts": 4}, "draws random numbers in training that are no dropout")}
# Where nothing is trained, sampled or scored.
PADDING, AHEAD = "reads the padding of a row", "reads ahead"
REFUSED = {
    "rwkv": ({"attention_hidden_size": 64}, PADDING),
    "recurrent_gemma": (
        {"lru_width": 64, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        PADDING,
    ),
    "bart": (
        {"decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4, "init_std": 0.2},
        PADDING,
    ),
    "bert": ({"initializer_range": 0.2}, AHEAD),
}
BALANCED = ["gpt_oss", "qwen3_next", "qwen3_moe", "mixtral"]

DTYPES = ["fp32", "bf16", "autocast", "4-bit"]

ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]]


def config_of(name, **options):
    return AutoConfig.for_model(name, **{**SMALL, **ARCHITECTURES.get(name, {}), **options})


def build(name, auto, dtype=torch.float32):
    labels = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    torch.manual_seed(0)
    model = auto.from_config(config_of(name, **labels))
    with torch.no_grad():  # biases and norms of a fresh model are all 0 or 1 and would hide what they do
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            # `to` would round the frequencies of rotary positions, too, which `from_pretrained` does not.
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def padded(rows, side):
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = [f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(f)
        for r, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def after_the_first(per_token, mask):
    """Values `[T]` of the real tokens but the first, row by row."""
    return torch.cat([values[real.bool()][1:] for values, real in zip(per_token, mask, strict=True)]).float()


def of_labels(logits, ids):
    """Log-probabilities `[N, T]` of the tokens, from the logits `[N, T - 1, V]` that predict them."""
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(logps, (1, 0))


def roles(policy):
    head = ValueFunction.on_trunk_of(policy)
    torch.manual_seed(3)
    torch.nn.init.normal_(head.module.weight, std=0.1)
    return Roles(policy, policy, head, Accelerator(cpu=True), 1.0, False, None)


def policy_role(model, ids, mask):
    completion = mask.bool() & (mask.cumsum(1) > 1)
    return token_logps(model, Rows(ids, mask, completion, torch.arange(len(ids))))[0]


def reference_role(model, ids, mask):
    return after_the_first(of_labels(roles(model).logits(model, ids, mask, ids.shape[1] - 1), ids), mask)


def value_head_role(model, ids, mask):
    # The first token is the prompt, which is padded on the left, and the others are the completion, padded on the right.
    before = mask.argmax(1).max()
    order = mask.argsort(dim=1, descending=True, stable=True)
    ids, mask = (torch.nn.functional.pad(x.gather(1, order), (before, 0)) for x in (ids, mask))
    of_model = roles(model)
    values = of_model.logps(model, of_model.episodes(ids, mask, ids.shape[1] - 1 - before)).values
    return after_the_first(torch.nn.functional.pad(values, (before + 1, 0)), mask)


def ptx_role(model, ids, mask):
    # Blocks of text are padded at their end alone.
    order = mask.argsort(dim=1, descending=True, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    labels = ids.masked_fill(mask == 0, -100)
    labels.scatter_(1, mask.argmax(1, keepdim=True), -100)  # nothing stands before the first token
    losses = []
    for row in range(len(ids)):
        counts = torch.full_like(labels, -100)
        counts[row] = labels[row]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": counts}
        losses.append(pretraining_loss(model, batch, 1.0, False, False))
    return torch.stack(losses)


def dpo_role(model, ids, mask):
    completion = mask.bool() & (mask.cumsum(1) > 1)
    return completion_logps(model, Rows(ids, mask, completion, torch.arange(len(ids))))["log_probs"]


def evaluation_role(model, ids, mask):
    tiles = [logits for _, logits in logits_in_tiles(model, torch.arange(ids.numel()), ids, mask)]
    return after_the_first(of_labels(torch.cat(tiles).view(*ids.shape, -1)[:, :-1], ids), mask)


def value_role(model, ids, mask):
    return after_the_first(token_scores(model, ids, mask), mask)


def reward_role(model, ids, mask):
    return sequence_scores(model, ids, mask)


LANGUAGE = (policy_role, reference_role, value_head_role, ptx_role, dpo_role, evaluation_role)
SCALAR = (value_role, reward_role)


def as_4bit(model, auto, folder):
    model.save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = auto.from_pretrained(folder, quantization_config=settings, dtype=torch.float32).eval()
    keep_4bit_gradients(model)
    return model


def in_dtype(name, auto, dtype, folder):
    model = build(name, auto, torch.bfloat16 if dtype == "bf16" else torch.float32)
    return as_4bit(model, auto, folder) if dtype == "4-bit" else model


def autocast_in(dtype):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast")


def check_equal(values, expected, exact, what, tolerance=2e-5):
    """Within four times what the model's own rounding makes of the `exact` values, which are None in fp32 and 4 bits."""
    noise = torch.zeros(()) if exact is None else (exact - expected).abs().max()
    difference = (values - expected).abs().max()
    assert difference <= tolerance + 4 * noise, (what, float(difference), float(noise))


def check_padding(role, model, exact, rows, dtype, relative=None):
    with autocast_in(dtype):
        alone = torch.cat([role(model, *padded([row], "left")) for row in rows])
        batches = {side: role(model, *padded(rows, side)) for side in ("left", "right")}
    if dtype in ("bf16", "autocast"):
        exact = torch.cat([role(exact, *padded([row], "left")) for row in rows])
    else:
        exact = None
    tolerance = relative * max(1.0, alone.abs().max().item()) if relative else 2e-5
    for side, values in batches.items():
        check_equal(values, alone, exact, (role.__name__, side), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_padded_batches_equal_single_rows(name, dtype, tmp_path):
    for auto, read in ((AutoModelForCausalLM, LANGUAGE), (AutoModelForSequenceClassification, SCALAR)):
        if auto is AutoModelForSequenceClassification and name in NO_REWARD_MODEL:
            continue
        model, exact = in_dtype(name, auto, dtype, tmp_path), build(name, auto)
        if auto is AutoModelForCausalLM:
            add_fused_lm_head(model)
            add_fused_lm_head(exact)
        for role in read:
            check_padding(role, model, exact, ROWS, dtype)


# ---- the trainers --------------------------------------------------------------------------------------------------
def prepared(name, auto, dtype, folder):
    """The model by itself or by its folder, and the arguments that a trainer gets with it."""
    model = build(name, auto, torch.bfloat16 if dtype == "bf16" else torch.float32)
    if dtype != "4-bit":
        return model, {}, {"bf16": dtype == "autocast"}
    model.save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = auto.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    return model, {"peft_config": LoraConfig(r=2, target_modules="all-linear")}, {"bf16": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ppo_starts_from_ratio_1_and_kl_0_and_stays_there_at_learning_rate_0(
    name, dtype, tokenizer, tmp_path, monkeypatch
):
    policy, arguments, options = prepared(name, AutoModelForCausalLM, dtype, tmp_path / "base")

    def rewards(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    if name not in NO_REWARD_MODEL:
        rewards = build(name, AutoModelForSequenceClassification, policy.dtype)
    moved = []
    loss = episodes.clipped_policy_loss

    def watched(logps, old_logps, advantages, mask, *rest):
        moved.append((logps - old_logps)[mask].abs().max().item())
        return loss(logps, old_logps, advantages, mask, *rest)

    monkeypatch.setattr(episodes, "clipped_policy_loss", watched)
    rates = {"learning_rate": 0.0, "value_learning_rate": 0.0, "max_completion_length": 4, "ptx_coef": 1.0}
    args = config(tmp_path, router_aux_loss_coef=0.0, **rates, **options)
    trainer = PPOPtxTrainer(
        policy, rewards, args, PROMPTS, processing_class=tokenizer, pretrain_dataset=TEXTS, **arguments
    )
    assert not is_random(trainer.model)
    trainer.train()
    assert len(moved) == 2
    assert max(moved) < (1e-5 if dtype == "fp32" else 0.1)
    assert logs_of(trainer, "objective/kl") == pytest.approx([0.0, 0.0], abs=1e-5)
    assert logs_of(trainer, "clip_ratio/region_mean") == [0.0, 0.0]
    assert min(logs_of(trainer, "grad_norm/ppo") + logs_of(trainer, "grad_norm/ptx")) > 0
    assert min(logs_of(trainer, "grad_norm/value")) > 0


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_scores_as_the_trained_one(name, dtype, kind, tokenizer, tmp_path):
    if kind == "reward" and name in NO_REWARD_MODEL:
        with pytest.raises(ValueError, match=NO_REWARD_MODEL[name]):
            build(name, AutoModelForSequenceClassification)
        return
    auto = AutoModelForCausalLM if kind == "dpo" else AutoModelForSequenceClassification
    model, arguments, options = prepared(name, auto, dtype, tmp_path / "base")
    trainer_class, config_class = CLASSES[kind]
    # A row each, as it is read below: shared prefixes round otherwise in 16 bit.
    options |= {"max_steps": 1, "learning_rate": 1e-2, "logging_steps": 1, "prefix_sharing": False}
    if kind == "dpo":
        options["router_aux_loss_coef"] = 0.0
    args = config_class(**settings(tmp_path / "run", **options))
    trainer = trainer_class(
        model, args=args, train_dataset=Dataset.from_list(RAGGED[:1]), processing_class=tokenizer, **arguments
    )
    texts = [["the cat"] * 3, [" sat", " ran to the mat", " and the dog"]]
    before = trainer.score(*texts)
    if kind == "dpo":
        assert before == pytest.approx([0.0] * 3, abs=1e-6)
    trainer.train()
    if kind == "dpo":
        assert logs_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    trained = trainer.score(*texts)
    assert max(abs(a - b) for a, b in zip(before, trained, strict=True)) > 1e-3
    trainer.save_model()
    rows = [x + y for x, y in (build_ids(tokenizer, *text) for text in zip(*texts, strict=True))]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=options["bf16"]):
        if kind == "reward":
            values = sequence_scores(load_reward_model(tmp_path / "run"), *padded(rows, "right"))
            trained = torch.tensor(trained)
        else:
            quantization = {"quantization_config": model.config.quantization_config} if dtype == "4-bit" else {}
            loaded = load_causal_lm(tmp_path / "run", dtype=model.dtype, **quantization)
            keep_4bit_gradients(loaded)
            values, trained = (dpo_role(m, *padded(rows, "right")) for m in (loaded, trainer.model.eval()))
    torch.testing.assert_close(values, trained, rtol=0, atol=1e-5)


# ---- shared prefixes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_shared_prefixes_equal_rows_or_are_refused(name, dtype, tmp_path):
    ids, mask = padded([[*ROWS[2], *rest] for rest in ([60, 61, 62], [60, 70], [80, 81, 82, 83])], "right")
    prompts = torch.zeros(3, dtype=torch.long)
    if name in NOT_SHARED:
        assert NOT_SHARED[name] in prefix_sharing.why_not(in_dtype(name, AutoModelForCausalLM, dtype, tmp_path))
        return
    completion = mask.bool() & (torch.arange(ids.shape[1]) >= len(ROWS[2]))

    def logps(model, packed):
        return completion_logps(model, Rows(ids, mask, completion, prompts, packed))["log_probs"]

    def scores(model, packed):
        return sequence_scores(model, ids, mask, packed)

    for auto, read in ((AutoModelForCausalLM, logps), (AutoModelForSequenceClassification, scores)):
        model = in_dtype(name, auto, dtype, tmp_path)
        exact = read(build(name, auto), None) if dtype in ("bf16", "autocast") else None
        with autocast_in(dtype):
            rows = read(model, None)
            prefix_sharing.enable(model)
            check_equal(read(model, pack(ids, mask, prompts)), rows, exact, read.__name__)


# ---- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NOT_COMPARED)
def test_models_that_are_random_in_training_are_refused(name, tokenizer, tmp_path):
    options, sentence = NOT_COMPARED[name]
    for kind, auto in (("reward", AutoModelForSequenceClassification), ("dpo", AutoModelForCausalLM)):
        labels = {"num_labels": 1} if kind == "reward" else {}
        trainer_class, config_class = CLASSES[kind]
        arguments = {"train_dataset": Dataset.from_list(RAGGED[:1]), "processing_class": tokenizer}
        model = auto.from_config(config_of(name, **options, **labels))
        with pytest.raises(ValueError, match=sentence):
            trainer_class(model, args=config_class(**settings(tmp_path)), **arguments)
        trainer_class(model, args=config_class(**settings(tmp_path, disable_dropout=False)), **arguments)
    policy = AutoModelForCausalLM.from_config(config_of(name, **options))
    args = config(tmp_path, router_aux_loss_coef=0.0)
    with pytest.raises(ValueError, match=sentence):
        PPOPtxTrainer(policy, lambda **_: [], args, PROMPTS, processing_class=tokenizer)


@pytest.mark.parametrize("name", BALANCED)
def test_ppo_refuses_to_balance_experts(name, tokenizer, tmp_path):
    policy, args = build(name, AutoModelForCausalLM), config(tmp_path)
    with pytest.raises(ValueError, match="load balancing is not supported: set router_aux_loss_coef=0"):
        PPOPtxTrainer(policy, lambda **_: [], args, PROMPTS, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@torch.no_grad()
def test_passes_that_are_compared_have_no_dropout_even_where_training_has(name, tokenizer, tmp_path):
    model = build(name, AutoModelForCausalLM)
    reward = build(name, AutoModelForSequenceClassification)
    ids, mask = padded(ROWS, "left")
    args = config(tmp_path, disable_dropout=False)
    ppo = PPOPtxTrainer(model, reward, args, PROMPTS, processing_class=tokenizer)
    ppo.model.train()
    reads = [ppo.roles.read(ids, mask, 5, 3) for _ in range(2)]
    for once, again in zip(*reads, strict=True):
        assert torch.equal(once, again)
    torch.testing.assert_close(reads[0][0], reads[0][1], rtol=0, atol=1e-6)
    assert is_random(ppo.model)
    assert ppo.model.training
    trainer_class, config_class = CLASSES["dpo"]
    args = config_class(**settings(tmp_path, disable_dropout=False))
    dpo = trainer_class(
        build(name, AutoModelForCausalLM),
        args=args,
        train_dataset=Dataset.from_list(RAGGED[:1]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    dpo.model.train()
    inputs = dpo._prepare_inputs(next(iter(dpo.get_train_dataloader())))
    once, again = (dpo.compute_ref_log_probs(dpo.model, inputs) for _ in range(2))
    assert torch.equal(once, again)


# ---- the table in the documentation --------------------------------------------------------------------------------
PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
START, END = "<!-- made by tests/test_matrix.py -->\n", "<!-- end -->\n"


def layers_of(config):
    kinds = set(getattr(config, "layer_types", None) or ())
    names = {
        "sliding window": getattr(config, "sliding_window", None) or getattr(config, "window_size", None),
        "linear attention": "linear_attention" in kinds,
        "convolution": "conv" in kinds,
        "experts": getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None),
    }
    return ", ".join(name for name, is_so in names.items() if is_so) or "attention"


def table():
    lines = [
        "| architecture | layers | positions | prefixes of a prompt's completions | reward and value model | PPO-ptx |",
        "|---|---|---|---|---|---|",
    ]
    for name in ARCHITECTURES:
        model = build(name, AutoModelForCausalLM)
        ids = torch.ones(1, 2, dtype=torch.long)
        positions = "given" if "position_ids" in padded_inputs(model, ids, ids) else "from the mask"
        shared = "a row each" if prefix_sharing.why_not(model) else "shared"
        reward = "none in transformers" if name in NO_REWARD_MODEL else "yes"
        ppo = "with `router_aux_loss_coef: 0`" if name in BALANCED else "yes"
        lines.append(f"| `{name}` | {layers_of(model.config)} | {positions} | {shared} | {reward} | {ppo} |")
    for name, (_, sentence) in {**NOT_COMPARED, **REFUSED}.items():
        lines.append(f"| `{name}` | | | | refused: {sentence} | refused |")
    others = ", ".join(f"`{name}`" for name in sorted(prefix_sharing.MODEL_TYPES - {*ARCHITECTURES}))
    text = f"Prefix sharing is also proved, by `tests/models/test_prefix_sharing.py`, for {others}."
    return "\n".join([*lines, "", *textwrap.wrap(text, 120, break_on_hyphens=False)]) + "\n"


def test_the_documentation_has_this_table():
    assert table() in PAGE.read_text(encoding="utf-8"), "run python -m tests.test_matrix"


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")
