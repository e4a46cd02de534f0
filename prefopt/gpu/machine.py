"""The machine that is checked, what it lacks, and how much time is left."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version

import torch

from prefopt.gpu.random_models import MINIATURE, QWEN3_8B, QWEN3_600M, Shape

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "vllm")
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A GPU, or a CPU on which everything is done in miniature; shapes are those of Qwen 3.

    Attributes:
        capability: CUDA's compute capability; (0, 0) on a CPU and with ROCm.
        memory: bytes of the GPU.
    """

    name: str
    is_cuda: bool
    capability: tuple[int, int] = (0, 0)
    memory: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.is_cuda else torch.device("cpu")

    @property
    def is_rocm(self) -> bool:
        return self.is_cuda and torch.version.hip is not None

    @property
    def has_bf16(self) -> bool:
        """By the hardware: PyTorch says yes of older cards as well, on which it is emulated."""
        return self.is_cuda and (self.is_rocm or self.capability >= (8, 0))

    @property
    def dtype(self) -> str:
        """That models are trained in."""
        return "bf16" if self.has_bf16 else "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.has_bf16 else torch.float32

    @property
    def small(self) -> Shape:
        """The shape of which most checks are."""
        return QWEN3_600M if self.is_cuda else MINIATURE

    @property
    def quick(self) -> Shape:
        """The same with fewer words, where the LM head is not what is looked at."""
        return {**self.small, "vocab_size": min(32_768, self.small["vocab_size"])}

    @property
    def large(self) -> Shape:
        return QWEN3_8B if self.is_cuda else MINIATURE

    @cached_property
    def why_no_4bit(self) -> str | None:
        """The reason why weights cannot be packed in 4 bit here, or None."""
        try:
            pack_and_unpack(self.device)
        except Exception as error:  # whatever a package that does not fit the driver meets
            return f"bitsandbytes does not work: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return None

    def described(self) -> dict[str, object]:
        """For the JSON."""
        versions = {}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = None
        # With what it was built for, which the version of the package may leave out.
        versions["torch"] = torch.__version__
        return {
            "device": "cuda" if self.is_cuda else "cpu",
            "miniature": not self.is_cuda,
            "name": self.name,
            "capability": ".".join(map(str, self.capability)),
            "memory_gib": round(self.memory / GIB, 1),
            "dtype": self.dtype,
            "versions": versions,
        }


def pack_and_unpack(device: torch.device | str) -> None:
    """Try bitsandbytes' 4-bit weights; whatever is wrong with it raises."""
    from bitsandbytes import functional

    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    error = (back - weight).abs().max().item()
    # The widest gap between two values of NF4 is 0.3, half of it either way.
    if not error < 0.3:
        raise ValueError(f"values come back with an error of {error:.2g}")


def this_machine() -> Machine:
    """The first GPU, or the CPU."""
    if not torch.cuda.is_available():
        return Machine(f"{torch.get_num_threads()} threads of a CPU", is_cuda=False)
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(0)
    memory = torch.cuda.get_device_properties(0).total_memory
    return Machine(torch.cuda.get_device_name(0), True, capability, memory)


def release() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Budget:
    """Seconds that are left to a check.

    >>> Budget(10.0, clock=lambda: 0.0).has(9)
    True
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def has(self, seconds: float) -> bool:
        """Whether that many are left."""
        return self.left >= seconds
