"""What every forward pass keeps to: positions that do not depend on padding, and no randomness where it is unwanted."""

import inspect

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.errors import UserError


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
    # Sharded ones are not here yet.
    if any(weight.is_meta or hasattr(weight, "ds_id") for weight in weights):
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


def backbone(model: nn.Module) -> nn.Module:
    """The transformer below the head, inside wrappers (data parallel, PEFT)."""
    transformer = unwrapped(model).base_model
    # OPT's language model calls the decoder inside it, which is all there is.
    return getattr(transformer, "decoder", transformer) if transformer.config.model_type == "opt" else transformer


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (data parallel, PEFT); accelerate's own search walks all modules."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model
