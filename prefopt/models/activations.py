"""What a transformer holds while it runs, measured on fake tensors: they have sizes, but no contents and no memory.

The model's own forward and backward run, with adapters, autocast, gradient checkpointing and shared prefixes, so that
nothing here has to know its layers.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import finalize

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefopt.models.passes import last_mlp_at, sharing
from prefopt.models.prefix.sharing import enable, plan, why_not
from prefopt.models.reward import checkpoint_activations


class Meter(TorchDispatchMode):
    """While it lasts, bytes of all storages that operations make, alive now and at most; not of `known` tensors.

    >>> with Meter() as meter:
    ...     x = torch.zeros(4) + 1
    ...     x = x[:2] * 1
    >>> meter.live, meter.peak
    (8, 32)
    """

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self.live += storage.nbytes()
                    finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


def activation_bytes(
    net: nn.Module,
    rows: tuple[Tensor, Tensor, Tensor],
    *,
    is_trained: bool = True,
    shares_prefixes: bool = False,
    is_quantized: bool = False,
    autocast: bool = False,
    checkpointing: bool = False,
    first: int = 0,
    adapter_dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Bytes that a transformer keeps for its backward pass, its output included, and its peak over both passes.

    Weights and their gradients are not counted, but a gradient is where it exists before it is added to those before.
    The embeddings take none: it would hide, in a model of few layers, what grows with the layers.

    Args:
        net: on the meta device, which is spent: a transformer without a head, or with an adapter's weights injected.
        rows: token ids and attention mask `[N, T]`, and the prompt of each row `[N]`, as for `pack`.
        is_trained: else the forward pass alone runs, of which nothing is kept.
        is_quantized: frozen linear maps stand for those of bitsandbytes.
        autocast: to bfloat16.
        first: the position from which hidden states are read (`last_mlp_at`).
    """
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
        elif is_quantized and isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.forward = lambda x, m=module: _Unpacked.apply(x.to(m.weight.dtype), m.weight).to(x.dtype)
        elif is_quantized and autocast and isinstance(module, LoraLayer):
            # On bitsandbytes' maps peft leaves the input to CUDA's autocast, elsewhere it casts it to fp32 before.
            module.cast_input_dtype_enabled = False
    has_adapter = any(".lora_" in name for name, _ in net.named_parameters())
    if is_trained and (checkpointing or not has_adapter):
        net.enable_input_require_grads()
    if is_trained and checkpointing:
        checkpoint_activations(net, {"use_reentrant": False})
    net.train(is_trained)
    if shares_prefixes and why_not(net) is None:
        enable(net)
    packed = plan(net, *rows)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Meter(_make_fake(net, mode, adapter_dtype)) as meter:
        with torch.set_grad_enabled(is_trained), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if packed is None:
                with last_mlp_at(net, first, rows[0].shape[1]) if first else nullcontext():
                    output = net(input_ids=rows[0].clone(), attention_mask=rows[1].clone(), use_cache=False)[0]
            else:
                where = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
                with sharing(net, packed):
                    output = net(**where, use_cache=False)[0]
            kept = meter.live
        if is_trained:
            output.backward(torch.empty_like(output))
    return kept, meter.peak


class _Unpacked(torch.autograd.Function):
    """bitsandbytes' linear map: the weight exists unpacked for a moment of each pass, and no input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ weight.clone().t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.clone(), None


def _make_fake(net: nn.Module, mode: FakeTensorMode, adapter_dtype: torch.dtype) -> list[Tensor]:
    """Give a model on the meta device fake weights and gradients, as if on the CPU, and return them all."""
    known: list[Tensor] = []
    for name, module in net.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                meta = tensor.detach().to("meta", adapter_dtype if "lora_" in name else None)
                fake = FakeTensor(mode, meta, torch.device("cpu"))
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    if tensor.requires_grad:
                        fake.grad = torch.zeros_like(fake)
                        known.append(fake.grad)
                known.append(fake)
                tensors[key] = fake
    return known
