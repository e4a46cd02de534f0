"""Reward and value models: read-out of the scalar head, the reward bias, the reward token, cloning.

A reward model is a standard `AutoModelForSequenceClassification` with one label, or a `PeftModel` of one. Its head is
called `score`. prefopt's score is the head's output at the last token minus `config.reward_bias`, so a plain
transformers user gets the same number by subtracting that one field: in batches if the pad token is not EOS, otherwise
row by row (see `prefopt.models.checkpoints`). With `config.reward_token_id`, that token is appended to every sequence
before it is scored.
"""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AddedToken, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.models.passes import forward, last_states, padded_inputs
from prefopt.models.prefix.layout import PackedRows, Rows

logger = logging.getLogger(__name__)


def _classifier(model: nn.Module) -> PreTrainedModel:
    """The sequence classifier inside wrappers (data parallel, PEFT)."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise UserError(
                "prompt-learning adapters shift the token positions; use an adapter on weights, such as LoRA"
            )
        model = model.get_base_model()
    if getattr(model, "score", None) is None or getattr(model.config, "num_labels", None) != 1:
        raise UserError(
            f"{type(model).__name__} is no reward model: expected a decoder loaded with "
            "`AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`, whose head is called `score`"
        )
    return model


@contextmanager
def _padding_allowed(config: PreTrainedConfig) -> Iterator[None]:
    # The model's own pooling refuses a batch without a pad token. Its result is not used here, so any id will do.
    config = config.get_text_config()
    missing = config.pad_token_id is None
    if missing:
        config.pad_token_id = 0
    try:
        yield
    finally:
        if missing:
            config.pad_token_id = None


def _hidden_states(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[N, T, hidden]` of the backbone.

    The whole (possibly wrapped) model is called, not the backbone alone: mixed precision, data parallel gradient
    hooks and sharded parameters all hang on that call.
    """
    classifier = _classifier(model)
    captured: list[torch.Tensor] = []
    handle = classifier.score.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    try:
        with _padding_allowed(classifier.config):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def _apply_head(model: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`score` head in fp32, whatever autocast says, minus the reward bias; drops the last axis."""
    classifier = _classifier(model)
    head = classifier.score
    with torch.autocast(device_type=hidden_states.device.type, enabled=False):
        if all(parameter.dtype == torch.float32 for parameter in head.parameters()):
            scores = head(hidden_states.float())
        else:
            weights = {name: parameter.float() for name, parameter in head.named_parameters()}
            scores = torch.func.functional_call(head, weights, (hidden_states.float(),))
    return scores.squeeze(-1) - get_reward_bias(classifier)


def token_scores(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Score after every token: backbone + `score` head at each position, minus `config.reward_bias`.

    Args:
        model: reward or value model, full or PEFT, wrapped or not.
        input_ids: token ids `[N, T]`, padded on either side.
        attention_mask: `[N, T]`, 1 = real token.

    Returns:
        fp32 scores `[N, T]`, differentiable. Values at padding are meaningless.

    Raises:
        ValueError: the model has no one-label `score` head.
    """
    hidden_states = _hidden_states(model, **padded_inputs(model, input_ids, attention_mask))
    return _apply_head(model, hidden_states)


def token_values(model: nn.Module, rows: Rows) -> torch.Tensor:
    """`token_scores` `[M]` of the states in which the completions' tokens were drawn (`rows.read`).

    The transformer is called, not the model: this one must neither be wrapped (data parallel) nor sharded.
    """
    return _apply_head(model, last_states(model, rows))


def append_reward_token(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put `config.reward_token_id`, if the model reads its score at one, after the last real token of every row.

    Everything that scores calls this, so a row that already ends with the token, or has no real token, stays as it is.

    Args:
        model: reward model, full or PEFT, wrapped or not.
        input_ids: token ids `[..., T]`, padded on either side.
        attention_mask: `[..., T]`, 1 = real token.

    Returns:
        `input_ids` and `attention_mask`, one column wider if a row had no room for the token.
    """
    token = getattr(_classifier(model).config, "reward_token_id", None)
    if token is None:
        return input_ids, attention_mask
    last = (torch.arange(1, input_ids.shape[-1] + 1, device=input_ids.device) * attention_mask.long()).amax(-1)
    final = input_ids.gather(-1, (last - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    lacks = (last > 0) & (final != token)
    if (lacks & (last == input_ids.shape[-1])).any():
        input_ids = nn.functional.pad(input_ids, (0, 1))
        attention_mask = nn.functional.pad(attention_mask, (0, 1))
    here = lacks.unsqueeze(-1) & (torch.arange(input_ids.shape[-1], device=last.device) == last.unsqueeze(-1))
    return input_ids.masked_fill(here, token), attention_mask.masked_fill(here, 1)


def last_read(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Position `[N]` of the token at which the score of each row `[N, T]` is read: the last real one.

    A model that was trained elsewhere with EOS for its pad token has that for `config.unread_token_id`: its head was trained,
    and is read by transformers, at the token before.
    """
    is_read = attention_mask.bool()
    unread = getattr(_classifier(model).config, "unread_token_id", None)
    if unread is not None:
        is_read = is_read & (input_ids != unread)
    return (torch.arange(input_ids.shape[1], device=input_ids.device) * is_read).argmax(-1)


def sequence_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    packed: PackedRows | None = None,
) -> torch.Tensor:
    """prefopt's score of each sequence: `token_scores` at the last real token, or at the appended reward token.

    The last real token (`last_read`) is found from the attention mask. Every row must have at least one real token. The reward token is appended here (see `append_reward_token`).

    Args:
        model: reward model, full or PEFT, wrapped or not.
        input_ids: token ids `[N, T]`, padded on either side.
        attention_mask: `[N, T]`, 1 = real token.
        packed: the same rows, reward token included, as `prefix_sharing.plan` packed them: they are then forwarded as
            one, with shared prefixes once.

    Returns:
        fp32 scores `[N]`, differentiable.

    Raises:
        ValueError: `packed` is not of these rows, or the model has no one-label `score` head.
    """
    input_ids, attention_mask = append_reward_token(model, input_ids, attention_mask)
    last = last_read(model, input_ids, attention_mask)
    if packed is not None and packed.index.shape != input_ids.shape:
        raise UserError(
            f"packed rows {tuple(packed.index.shape)} are not those of input_ids {tuple(input_ids.shape)}; append the "
            "reward token (`append_reward_token`) before packing"
        )
    row = torch.arange(len(last), device=last.device)
    rows = Rows(input_ids, attention_mask, attention_mask, row, packed)
    with _padding_allowed(_classifier(model).config):
        _, states = forward(model, rows, row, last, of_head=False)
    return _apply_head(model, states).to(input_ids.device)


def read_scores(model: nn.Module, rows: Rows) -> dict[str, torch.Tensor]:
    """`sequence_scores` of rows to which `append_reward_token` was applied: `scores` `[N]`."""
    return {"scores": sequence_scores(model, rows.input_ids, rows.attention_mask, rows.packed)}


def get_reward_bias(model: nn.Module) -> float:
    """`config.reward_bias`: what is subtracted from the head's output (0 when it was never set)."""
    return float(getattr(_classifier(model).config, "reward_bias", 0.0))


def set_reward_bias(model: nn.Module, value: float) -> None:
    """Store the bias as `config.reward_bias`; `save_reward_model` and the trainers keep it, adapters included."""
    _classifier(model).config.reward_bias = float(value)


@torch.no_grad()
def fold_reward_bias(model: nn.Module) -> None:
    """Move `config.reward_bias` into the head's own bias, where it has one: the plain logit is then prefopt's score.

    The heads of transformers have none, so the field stays and the plain logit minus it is the score.
    """
    classifier = _classifier(model)
    if (bias := getattr(classifier.score, "bias", None)) is not None:
        bias -= get_reward_bias(classifier)
        set_reward_bias(classifier, 0.0)


# So many rows of so many random tokens show the scale of a model's hidden states.
_PROBE = (8, 16)


@torch.no_grad()
def hidden_scale(model: nn.Module) -> float:
    """Root mean square of the last hidden state of a token: the median over rows of random tokens.

    Of order 1 for some models, several times that for others (Gemma). A few tokens, the first one above all, have states
    of another size, which the median does not see; the first is left out.
    """
    classifier = _classifier(model)
    config, training = classifier.config.get_text_config(), classifier.training
    ids = torch.randint(0, config.vocab_size, _PROBE, generator=torch.Generator().manual_seed(0))
    if config.bos_token_id is not None and config.bos_token_id < config.vocab_size:
        ids[:, 0] = config.bos_token_id
    ids = ids.to(classifier.device)
    classifier.eval()
    try:
        states = _hidden_states(model, **padded_inputs(model, ids, torch.ones_like(ids)))[:, 1:]
    finally:
        classifier.train(training)
    scale = states.float().square().mean(-1).sqrt().median().item()
    # Where only one process has loaded the weights, which it hands to the others later, these have anything.
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def init_score_head(model: nn.Module) -> None:
    """Draw a new head: normal with standard deviation 1 / (s * sqrt(hidden + 1)), s the scale of the hidden states.

    Scores are then of order 1 and differ less within a prompt, so that training starts from a loss near log 2, yet not 0,
    so that the backbone gets gradients from the first step. For s = 1 it is Stiennon et al. 2020 (arXiv:2009.01325), whose
    reward model InstructGPT continues (the paper states no scale of its own); s is measured (`hidden_scale`).
    """
    head, scale = _classifier(model).score, hidden_scale(model)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(module.in_features + 1) ** -0.5 / scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(head, ModulesToSaveWrapper):  # both copies start equal, as PEFT makes them
        for saved in head.modules_to_save.values():
            saved.load_state_dict(head.original_module.state_dict())


def _cast_input(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].to(next(module.parameters()).dtype),)


def keep_head_fp32(model: nn.Module) -> None:
    """Cast the head's weights to fp32 in place; a plain `model(...)` on a 16-bit base keeps working."""
    head = _classifier(model).score.float()
    if _cast_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_cast_input)


def keep_4bit_gradients(model: nn.Module) -> None:
    """Keep the input gradients of bitsandbytes' 4-bit layers on CPUs with AVX512-BF16.

    There, bitsandbytes repacks a layer's weights for good in the first forward in evaluation mode, and the repacked
    layer passes no gradient to its input: training then goes on without a word, wrongly. To be called before the
    first forward of a 4-bit model that is to be trained; prefopt's trainers and loaders do. Other models are left alone.
    A layer that was repacked already is restored, but its scales were rounded to bf16 on the way (a warning says so).
    """
    repacked = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # saving is where bitsandbytes restores the layout
                repacked += 1
    if repacked:
        logger.warning(
            "%d 4-bit layers had been used for evaluation on the CPU, which rounds their scales; load the model again "
            "and call `keep_4bit_gradients` first to train on the exact weights",
            repacked,
        )


def checkpoint_activations(model: PreTrainedModel | PeftModel, options: dict[str, Any] | None = None) -> None:
    """`model.activation_checkpointing_enable(options)`, which transformers before 5.23 knows by its older name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def add_reward_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Make the model read its score at `token`, put after the end of every completion; returns the token's id.

    The tokenizer gets the token if it lacks it, the embeddings a row if they lack it (many vocabularies have spare or
    reserved rows, and taking one of those keeps the model's shape), and `config.reward_token_id` the id.

    Raises:
        ValueError: the text already uses the token, or the model reads at another one.
    """
    if token in (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token):
        raise UserError(f"reward_token {token!r} has a role in the text already (EOS, PAD, BOS or UNK); take another")
    if token in tokenizer.get_vocab() and token not in tokenizer.get_added_vocab():
        raise UserError(f"reward_token {token!r} is an ordinary token of the text; take a special one")
    tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(token)
    other = getattr(model.config, "reward_token_id", None)
    if other not in (None, token_id):
        raise UserError(
            f"the model reads its score at token {other}, but reward_token {token!r} has the id {token_id}"
        )
    if other == token_id:
        return token_id
    if token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(token_id + 1)
    model.config.reward_token_id = token_id
    return token_id


def train_reward_token(config: PeftConfig, model: PreTrainedModel) -> None:
    """Have a LoRA configuration train, and save, the row of the model's reward token in the embeddings."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[2]
    rows = getattr(config, "trainable_token_indices", None) or {}
    rows = dict(rows) if isinstance(rows, dict) else {name: rows}
    rows[name] = sorted({*rows.get(name, ()), model.config.reward_token_id})
    config.trainable_token_indices = rows


def value_model_from(reward_model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """A trainable copy of a reward model, head and bias included: InstructGPT's initial value function (C.4).

    Values are read at every token of the text, never at a reward token, so after a reward model that has one the value
    function starts from an extrapolation of its head.

    Of a PEFT model the adapter and the head are trainable, of a full model everything.
    """
    value_model = copy.deepcopy(reward_model).train()
    if isinstance(value_model, PeftModel):
        value_model.requires_grad_(False)
        value_model.active_peft_config.inference_mode = False
        value_model.set_adapter(value_model.active_adapter)
    else:
        for parameter in value_model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    keep_head_fp32(value_model)
    return value_model
