"""What a bug report needs: versions, hardware, what works on it, and the settings that change what happens.

prefopt env
"""

import argparse
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "prefopt",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "huggingface_hub",
    "tokenizers",
    "numpy",
    "lm-eval",
    "vllm",
    "deepspeed",
    "liger-kernel",
    "trackio",
    "wandb",
    "tensorboard",
)
# Settings that change what these libraries do; of a name that speaks of a secret only that it is set is shown.
PREFIXES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_", "PREFOPT_", "CUDA_VISIBLE", "PYTORCH_")
PREFIXES += ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "BNB_", "NCCL_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "HEADER")


def system() -> dict[str, str]:
    """Python and the operating system."""
    return {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "Platform": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    """The installed version of each package that matters; those that are not installed are named as such."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, str]:
    """The accelerator, its memory, and whether bf16 and bitsandbytes' 4-bit weights work on it."""
    import torch

    lines = {"CPUs": f"{os.cpu_count()}, {torch.get_num_threads()} threads"}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        lines[f"GPU {number}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.cuda.device_count() == 0:
        others = "MPS" if torch.backends.mps.is_available() else "none"
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        lines["GPU"] = f"{others} (torch is built for {torch.version.hip or built})"
    lines["bf16"] = "yes" if _has_bf16() else "no GPU that has it: training is in fp32"
    lines["4-bit weights (bitsandbytes)"] = _outcome(_quantize)
    return lines


def _has_bf16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _quantize() -> str:
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    error = (back - weight).abs().max().item()
    if not error < 0.3:  # the widest gap between two values of NF4 is 0.3, half of it either way
        raise ValueError(f"values come back with an error of {error:.2g}")
    return f"work on {device}"


def _outcome(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except Exception as error:  # whatever it is, it belongs into the report
        return f"do not work: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def settings() -> dict[str, str]:
    """Environment variables of the libraries; secrets are not shown."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
    return {
        name: "set, not shown" if any(word in name for word in SECRETS) else value
        for name, value in found.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    argparse.ArgumentParser("prefopt env", description="What a bug report needs.").parse_args(argv)
    print("Copy this into a bug report:\n")
    for part in (system, package_versions, settings, hardware):  # the last one takes seconds
        for name, value in part().items():
            print(f"- {name}: {value}", flush=True)


if __name__ == "__main__":
    main()
