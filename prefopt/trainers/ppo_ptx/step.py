"""The optimizer step of PPO-ptx: the gradients of its parts, the groups that learn, and their warm-up."""

from collections.abc import Callable, Iterable

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def complete_gradient(
    policy: list[nn.Parameter],
    values: list[nn.Parameter],
    add_text: Callable[[list[nn.Parameter]], tuple[Tensor, dict[str, float]]] | None,
    is_warming_up: bool,
    accelerator: Accelerator,
) -> tuple[Tensor | None, dict[str, float]]:
    """What a step's gradient lacks after PPO's micro-batches: the value function's average, and the pretraining part.

    Args:
        policy, values: the trainable parameters of policy and value function.
        add_text: `Pretraining.add_to_gradient` of this step; None with `ptx_coef=0`.
        is_warming_up: whether the value function learns alone: then the policy gets no gradient.

    Returns:
        ptx_coef * LM of this process, if it was run; the numbers to log by their keys.
    """
    for parameter in values:
        # Alone there is nothing to average, and `reduce` would copy the gradient all the same.
        # FSDP has averaged a sharded one.
        is_own = accelerator.num_processes > 1 and not isinstance(parameter, DTensor)
        if parameter.grad is not None and is_own:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    metrics = {"grad_norm/value": _norm(values).item()}
    if is_warming_up:
        for parameter in policy:
            parameter.grad = None
    metrics["grad_norm/ppo"] = _norm(policy).item()
    if add_text is None or is_warming_up:
        return None, metrics
    loss, of_text = add_text(policy)
    return loss, metrics | of_text


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, the same on every process."""
    norms = [get_total_norm(kind) for kind in _by_kind(p.grad for p in parameters if p.grad is not None)]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else get_total_norm(norms)


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Whole and sharded tensors apart, which no fused operation takes together; no kind of which there is none.

    An adapter on the policy's base is sharded with it, its head is whole.
    """
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return [kind for kind in kinds if kind]


def clip_gradient(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Clip all gradients together, of whole and of sharded parameters."""
    norm = _norm(parameters)
    for kind in _by_kind(parameters):
        clip_grads_with_norm_(kind, max_norm, norm)


def add_value_groups(
    optimizer: Optimizer, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
) -> None:
    """Let the optimizer train the value function at its own learning rate, unless it does so already."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if known & {id(p) for p in parameters}:
        return
    # Norms and biases do not decay, as in Trainer.
    for is_decayed in (True, False):
        group = {
            "lr": learning_rate,
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for kind in _by_kind(p for p in parameters if (p.ndim > 1) == is_decayed) or [[]]:
            optimizer.add_param_group({"params": kind, **group})


def warm_up_from(scheduler: LambdaLR, start: float, warmup_steps: int) -> LambdaLR:
    """A schedule whose warm-up starts at the share `start` of the peak instead of 0, for all groups."""

    def from_start(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: start + (1 - start) * factor(step) if step < warmup_steps else factor(step)

    return LambdaLR(scheduler.optimizer, [from_start(factor) for factor in scheduler.lr_lambdas])
