"""What a bug report needs: versions, hardware, what works on it, and the settings that change what happens.

prefopt env
"""

import argparse
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

# Settings that change what these libraries do; of a name that speaks of a secret only that it is set is shown.
PREFIXES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_", "PREFOPT_", "CUDA_VISIBLE", "PYTORCH_")
PREFIXES += ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "BNB_", "NCCL_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "HEADER")


def packages() -> dict[str, str]:
    """Versions that TRL's report does not have."""
    versions = {}
    for name in ("prefopt", "lm-eval"):
        try:
            versions[f"{name} version"] = version(name)
        except PackageNotFoundError:
            versions[f"{name} version"] = "not installed"
    return versions


def seams() -> dict[str, str]:
    """Whether each trainer finds in the installed TRL and transformers what it is built on."""
    from prefopt.trainers.shared.trl_contract import verdicts

    return {trainer: "; ".join(problems) or "works with them" for trainer, problems in verdicts().items()}


def hardware() -> dict[str, str]:
    """What the machine has beyond its names, and whether bf16 and bitsandbytes' 4-bit weights work on it."""
    import torch

    lines = {"CPUs": f"{os.cpu_count()}, {torch.get_num_threads()} threads"}
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory
        lines[f"Memory of GPU {number}"] = f"{memory / 2**30:.1f} GiB"
    built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    lines["torch is built for"] = built if torch.version.hip or torch.version.cuda else "CPU only"
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    lines["bf16"] = "yes" if has_bf16 else "no GPU that has it: training is in fp32"
    lines["4-bit weights (bitsandbytes)"] = _outcome(_quantize)
    return lines


def _quantize() -> str:
    import torch

    from prefopt.gpu.machine import pack_and_unpack

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pack_and_unpack(device)
    return f"work on {device}"


def _outcome(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except Exception as error:  # whatever it is, it belongs into the report
        return f"do not work: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def settings() -> dict[str, str]:
    """Environment variables of the libraries; secrets are not shown."""
    return {
        name: "set, not shown" if any(word in name for word in SECRETS) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES)
    }


def main(argv: list[str] | None = None) -> None:
    """Print TRL's report of versions and hardware, and what prefopt needs as well."""
    argparse.ArgumentParser("prefopt env", description="What a bug report needs.").parse_args(argv)
    from trl.scripts.env import print_env

    print_env()
    for part in (packages, seams, settings, hardware):  # the last one takes seconds
        for name, value in part().items():
            print(f"- {name}: {value}", flush=True)
