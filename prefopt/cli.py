"""The command line: `prefopt <command> --config file.yaml [--key value ...]`."""

import sys
from importlib import import_module

from prefopt.recipes.common.errors import run_command

# Group -> command -> the module whose `main(argv)` runs it, and its line in the help.
GROUPS = {
    "the three steps": {
        "sft": ("prefopt.recipes.sft", "step 1: supervised fine-tuning on demonstrations or text"),
        "reward": ("prefopt.recipes.reward", "step 2: reward model from rankings of K completions"),
        "ppo-ptx": ("prefopt.recipes.ppo_ptx", "step 3: PPO with a KL penalty and pretraining gradients"),
        "dpo": ("prefopt.recipes.dpo", "instead of reward + ppo-ptx: DPO from rankings"),
    },
    "data and labels": {
        "sample": ("prefopt.recipes.sample", "draw K completions per prompt, to be ranked"),
        "best-of-n": ("prefopt.recipes.best_of_n", "keep the best of n completions by the reward model"),
        "rank": ("prefopt.recipes.rank", "rank samples by reward models, a language model or a function"),
        "data": ("prefopt.recipes.data", "public formats to rankings; check, describe and split data"),
        "label": ("prefopt.recipes.label", "people rank samples in a browser; who agrees; what to rank next"),
    },
    "loop": {
        "iterate": ("prefopt.recipes.iterate", "sample, rank, learn, evaluate, and again from the new policy"),
    },
    "evaluate": {
        "eval": ("prefopt.recipes.evaluate", "is it better, by how much, how sure, at what cost"),
        "explain-run": ("prefopt.recipes.explain_run", "what moved the weights when, and what went wrong"),
    },
    "plan and share": {
        "plan": ("prefopt.recipes.plan", "does it fit: memory of each step, before anything is downloaded"),
        "push": ("prefopt.recipes.push", "publish a trained model on the Hub, with a model card"),
    },
    "start and help": {
        "pipeline": ("prefopt.recipes.pipeline", "all steps on a small closed world, ending in a report"),
        "sweep": ("prefopt.recipes.sweep", "ptx_coef and kl_coef varied, from a finished pipeline run"),
        "frontier": ("prefopt.recipes.frontier", "reward against KL of every method on a pretrained model"),
        "recipes": ("prefopt.recipes.recipes", "settings that work, one folder per purpose: list, copy"),
        "gpu-check": ("prefopt.gpu.command", "does it work on this GPU, and what does it gain there: a table"),
        "env": ("prefopt.recipes.env", "versions and hardware, for a bug report"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


def usage() -> str:
    """The help text: every command with one line."""
    lines = [
        "usage: prefopt <command> [--config file.yaml] [--key value ...]",
        "",
        "Learn from rankings of K completions: reward model, PPO-ptx and DPO on Hugging Face TRL.",
    ]
    for title, commands in GROUPS.items():
        if commands:
            lines += ["", f"{title}:", *(f"  {name:<12} {text}" for name, (_, text) in commands.items())]
    lines += [
        "",
        "first run, about 10 minutes on 2 CPU cores, no network:",
        "  prefopt recipes copy tiny",
        "  prefopt pipeline --config tiny/pipeline.yaml",
        "",
        "`prefopt <command> --help` lists a command's keys; keys on the command line win over the file.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a wrong command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from prefopt import __version__

        print(f"prefopt {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"prefopt: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    command, *rest = argv
    module, _ = COMMANDS[command]
    run_command(lambda arguments: import_module(module).main(arguments), command, rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
