"""What every forward pass keeps to: rows that are read in a batch as alone, nothing computed that is not read, and no
randomness where it is unwanted."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.errors import UserError
from prefopt.models.prefix.layout import PackedRows, Rows


def padded_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """The keyword arguments of a forward over padded rows: ids, mask and the position of each token in its own row.

        position[t] = number of real tokens before t

    Left to themselves, models that learn or add absolute positions (GPT-2, GPT-Neo, GPT-BigCode) count padding on the
    left, though `generate` does not. Those whose forward takes no positions have none, or count them by the mask.

    Args:
        model: any model of the library, wrapped or not, or a role on a base that others share.
        input_ids: `[N, T]`, padded on either side.
        attention_mask: `[N, T]`, 1 = real token.

    Example:
        >>> from transformers import PreTrainedConfig
        >>> class Model(nn.Module):
        ...     base_model = property(lambda self: self)
        ...     config = PreTrainedConfig()
        ...     def forward(self, input_ids, attention_mask, position_ids): ...
        >>> padded_inputs(Model(), torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))["position_ids"]
        tensor([[0, 0, 0, 1]])
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(backbone(model).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def forward(
    model: nn.Module, rows: Rows, row: Tensor, position: Tensor, *, of_head: bool = True, **options: Any
) -> tuple[Any, Tensor | None]:
    """One forward over rows, packed or as they are, that is read at some positions and nowhere else.

    Args:
        model: any model, wrapped or not, or its transformer alone (`backbone`).
        rows: what goes in.
        row, position: `[M]`, where it is read.
        of_head: the model's head sees these positions alone, as one row `[1, M]`; else it sees all, of which those that are
            not read may be wrong (`last_mlp_at`).
        options: of the model's forward.

    Returns:
        The model's output, and its last hidden states `[M, hidden]` there; None where it ran another model's transformer.
    """
    seen: list[Tensor] = []
    if rows.packed is None:
        # The loss of a mixture's router is of all tokens.
        of_router = options.get("output_router_logits", False)
        cut = nullcontext() if of_router else last_mlp_at(model, int(position.min()), int(position.max()) + 1)
        inputs, index = (
            padded_inputs(model, rows.input_ids, rows.attention_mask),
            row * rows.input_ids.shape[1] + position,
        )
    else:
        cut = sharing(model, rows.packed)
        # The packed row is the only one.
        inputs = {"input_ids": rows.packed.input_ids, "position_ids": rows.packed.position_ids}
        index = rows.packed.index[row, position]

    def select(module: nn.Module, args: tuple, output: Any) -> Any:
        states = output.last_hidden_state
        seen.append(states.flatten(0, 1).index_select(0, index.to(states.device)))
        if of_head:
            output.last_hidden_state = seen[0].unsqueeze(0)
        return output

    handle = backbone(model).register_forward_hook(select)
    try:
        with cut:
            output = model(**inputs, use_cache=False, **options)
    finally:
        handle.remove()
    return output, seen[0] if seen else None


def last_states(model: nn.Module, rows: Rows) -> Tensor:
    """The last hidden states `[M, hidden]` of a model's transformer at `rows.read`.

    No head of a language model is run, but of one that is sharded.
    """
    called = model if is_sharded(model) else backbone(model)
    return forward(called, rows, rows.read.row, rows.read.position, of_head=False)[1]


@contextmanager
def sharing(model: nn.Module, packed: PackedRows) -> Iterator[None]:
    """While it lasts, the forward of the backbone treats its input as the packed row.

    Call the model with `packed.input_ids` and `packed.position_ids`. The whole model may be called (data parallel,
    PEFT, a head on top): the layout is handed over where the backbone is entered, past wrappers that would not pass
    it on.
    """

    def hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # A mask of four dimensions is taken as it is: none is built for the packed row, and the attention uses none.
        mask = packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask, "prefix_layout": packed.layout}

    handle = backbone(model).register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def last_mlp_at(model: nn.Module, first: int, end: int) -> Iterator[None]:
    """Inside, a forward whose hidden states are read at the positions `first` to `end - 1` alone does no more MLP.

    No attention follows the last layer's MLP: what it gives at one position reaches the last hidden state of that
    position and no other. At the other positions, prompts above all, it gives 0 here, so that their last hidden states
    are wrong and those that are read are the same. One MLP of one layer is little in a deep model, much in a small one.

    Nothing happens where the last layer is not `layers[-1]` of the backbone or has no `mlp`, nor where gradient
    checkpointing is to run the forward a second time, after this context.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not.
        first, end: columns of the model's input `[B, T]`; `end` may lie beyond it.
    """
    layers = getattr(backbone(model), "layers", None)
    last = layers[-1] if layers else None
    mlp = getattr(last, "mlp", None)
    runs_again = torch.is_grad_enabled() and getattr(last, "gradient_checkpointing", False) and last.training
    if not isinstance(mlp, nn.Module) or runs_again:
        yield
        return
    widths: list[int] = []  # of the input that is under way

    def cut(module: nn.Module, args: tuple) -> tuple | None:
        if not args:
            return None
        widths.append(args[0].size(1))
        # A copy: on a view the same weights gave results that differ in the last digit, and a first KL that is not 0.
        return args[0][:, first:end].contiguous(), *args[1:]

    def pad(module: nn.Module, args: tuple, output: Any) -> Any:
        if not widths:
            return output
        padding = (0, 0, first, max(0, widths.pop() - end))
        if isinstance(output, tuple):  # of experts, with what their router said
            return F.pad(output[0], padding), *output[1:]
        return F.pad(output, padding)

    handles = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens of a row a model reads, in a batch as alone; None where its config tells no limit.

    With "longrope" (Phi-3, Phi-4-mini) one row beyond `original_max_position_embeddings` gives every row of its batch other
    rotary frequencies, and a completion that grows beyond it was drawn with those of short rows: that is the limit.

    Example:
        >>> from transformers import BloomConfig, GPT2Config
        >>> max_positions(GPT2Config(n_positions=64)), max_positions(BloomConfig())
        (64, None)
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        # Of MPT, whose table of ALiBi ends there.
        return getattr(config, "max_seq_len", None)
    rope = getattr(config, "rope_parameters", None) or {}
    # One for each type of layers, or one for all.
    for scaling in (value if isinstance(value, dict) else rope for value in rope.values()):
        original = scaling.get("original_max_position_embeddings")
        if original is None:
            continue
        if scaling.get("rope_type") == "longrope":
            return original
        limit = max(limit, int((scaling.get("factor") or 1) * original))
    return limit


# Values that differ by more than so many times what rounding changes in them differ by more than rounding.
TIMES_NOISE = 4.0


@torch.no_grad()
def check_rows(model: nn.Module) -> None:
    """Refuse a model that reads a row otherwise in a batch than alone, or that reads ahead.

    The proof is a forward of two rows, one of them padded on the left, and one after a change of its padding's ids and of
    the other's last token: what is read elsewhere must stay as it is, and the padded row be what it is alone, but for the
    model's own rounding (`nudged`). That is 35 tokens in three forwards; a model that differs is asked again with another
    row, since 16-bit weights may choose other experts. Where weights are sharded before they are loaded there is no proof.

    Raises:
        UserError: the model reads padding (RWKV, RecurrentGemma), counts it as positions (BART), or reads ahead (BERT).
    """
    weights = [*model.parameters()]
    if _is_not_here(weights):
        return
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3], device=weights[0].device)

    def states(rows: list[list[int]], mask: Tensor) -> Tensor:
        inputs = padded_inputs(model, torch.tensor(rows, device=mask.device), mask)
        return backbone(model)(**inputs, use_cache=False).last_hidden_state.float()

    def difference(ours: Tensor, theirs: Tensor) -> float:
        return ((ours - theirs).norm() / theirs.norm()).item()

    def differences(row: list[int]) -> tuple[float, float, float]:
        """By a later token, by other padding, and by padding at all."""
        long, padded = [1, 2, 3, 1, 2, 3, 1], [1] * 5 + row
        first, second = states([[*long, 2], padded], mask), states([[*long, 3], [3] * 5 + row], mask)
        by_any = difference(first[1, 5:], states([row], mask[1:, 5:])[0])
        if by_any > 1e-2:
            with nudged(model):
                moved = states([[*long, 2], padded], mask)
            by_any *= by_any > TIMES_NOISE * difference(moved[1, 5:], first[1, 5:])
        return difference(second[0, :-1], first[0, :-1]), difference(second[1, 5:], first[1, 5:]), by_any

    was_training = model.training
    model.eval()
    try:
        by_later, by_other, by_any = differences([2, 3, 1])
        if by_any > 1e-2:
            by_any = min(by_any, differences([3, 1, 2])[2])
    finally:
        model.train(was_training)
    # Of one shape nothing differs but the order in which experts add tokens up.
    of_one_shape = 1e-3 if all(weight.dtype == torch.float32 for weight in weights) else 1e-2
    name = type(unwrapped(model)).__name__
    if by_later > of_one_shape:
        raise UserError(
            f"{name} reads ahead: what it says of a token depends on later ones, so it is no causal language model; "
            "take a decoder (of BERT and its relatives, one whose config has is_decoder=True)"
        )
    if by_other > of_one_shape or by_any > 1e-2:
        raise UserError(
            f"{name} reads the padding of a row: in a batch it gives a row other values than alone, so neither samples nor "
            "log-probabilities nor scores would be its own; take an architecture that docs/architectures.md names"
        )


def _is_not_here(weights: list[nn.Parameter]) -> bool:
    """Whether weights are sharded, or still to be loaded."""
    return any(weight.is_meta or hasattr(weight, "ds_id") for weight in weights)


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Inside, every entry of the embeddings is one unit in the last place larger or smaller, of the least exact type that
    the model computes in: what that changes is rounding."""
    compute = {getattr(module, "compute_dtype", None) for module in model.modules()} - {None}

    def nudge(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        device_type = output.device.type
        dtypes = {output.dtype, *compute}
        if torch.is_autocast_enabled(device_type):
            dtypes.add(torch.get_autocast_dtype(device_type))
        unit = max(torch.finfo(dtype).eps for dtype in dtypes)
        signs = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) % 2)
        return output * (1 + unit * signs).to(output.dtype)

    handle = unwrapped(model).get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


def stop_randomness(model: nn.Module) -> None:
    """Set every dropout of a model to 0, also those that are no modules, so that two passes can be compared.

    OPT, StarCoder2 and GPT-BigCode among others drop by function, with a rate that a module keeps as a number; experts'
    routers may add noise in the same way. The config, which is saved, keeps its rates, but where the forward reads them
    there (Falcon). The proof is one forward of two tokens in training mode: it must draw no random number (where weights
    are sharded before they are loaded there is no proof).

    Raises:
        UserError: it draws some all the same.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_rates(module)
    if is_random(model):
        _zero_rates(unwrapped(model).config.get_text_config())
    if is_random(model):
        raise UserError(
            f"{type(unwrapped(model)).__name__} draws random numbers in training that are no dropout, so its passes "
            "cannot be compared with each other: set disable_dropout=False if that is what you want"
        )


def _zero_rates(owner: object) -> None:
    for name, value in [*vars(owner).items()]:
        if isinstance(value, float) and ("drop" in name or "jitter_noise" in name):
            setattr(owner, name, 0.0)


@torch.no_grad()
def is_random(model: nn.Module) -> bool:
    """Whether a forward in training mode draws random numbers; the model's mode and random state stay as they are."""
    weights = [*model.parameters()]
    if _is_not_here(weights):
        return False
    device = weights[0].device
    was_training = model.training
    ids = torch.ones((1, 2), dtype=torch.long, device=device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]
        model.train()
        try:
            backbone(model)(**padded_inputs(model, ids, torch.ones_like(ids)), use_cache=False)
        finally:
            model.train(was_training)
        after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def loaded_from(model: nn.Module) -> str:
    """ " (PATH)" for an error, of a model that was loaded from there."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f" ({name})" if name else ""


def backbone(model: nn.Module) -> nn.Module:
    """The transformer below the head, inside wrappers (data parallel, PEFT)."""
    transformer = unwrapped(model).base_model
    # OPT's language model calls the decoder inside it, which is all there is.
    return getattr(transformer, "decoder", transformer) if transformer.config.model_type == "opt" else transformer


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model, or of a role, the model that it shares: its parts come together when all of it is
    called."""
    return isinstance(getattr(model, "shared_model", model), FSDPModule)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (data parallel, PEFT); accelerate's own search walks all modules."""
    # Of a role, the model that it shares.
    model = getattr(model, "shared_model", model)
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model
