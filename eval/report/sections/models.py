"""The models in numbers: rewards, alignment tax, drift, each with its difference to the baseline."""

from prefopt.evaluation.report.tables import Ask, Block, Column, Heading, Missing, Results, label


def section(results: Results) -> list[Block]:
    if not results.measures:
        raise Missing("no measures in the results")
    table = results.table(_asks(results))
    if not table:
        raise Missing("none of its numbers were measured; `prefopt eval compare`, `tax` and `drift` do")
    against_ppo = [
        Ask("bits per byte (lower is better)", "pretraining_bits_per_byte", 4, "ppo"),
        Ask("accuracy on held-out tasks", "heldout_task_accuracy", 3, "ppo"),
        Ask("gold reward, T = 1", "gold_reward", 3, "ppo"),
        Ask("gold reward, greedy", "gold_reward_greedy", 3, "ppo"),
    ]
    paired = results.table(against_ppo, [Column("difference", "ppo_ptx")])
    apart = results.settings.get("heldout_use_case")
    note = (
        "Small print under a number: its 95 % interval (bootstrap over prompts, documents or tasks). ▲ better and ▼ worse "
        "mark intervals that exclude no difference; differences are paired."
    )
    if apart:
        note += f" The use case “{apart}” was kept out of reward-model and RL training and is in no other row."
    return [*table, *([Heading("PPO-ptx minus PPO, paired")] if paired else []), *paired, note]


def _asks(results: Results) -> list[Ask | str]:
    baseline, name = results.baseline, label(results.baseline)
    minus = f"minus {name}"

    def parts(suffix: str) -> list[Ask]:
        prefix = f"gold_component{suffix}."
        return [Ask(part, prefix + part, indent=True) for part in results.names(prefix)]

    return [
        "Is it better? Gold reward as the judge",
        Ask("win rate, samples at T = 1", "winrate", 3, baseline),
        Ask("win rate, greedy", "winrate_greedy", 3, baseline),
        Ask("win rate, held-out use case", "winrate_heldout_use_case", 3, baseline),
        Ask("gold reward, T = 1", "gold_reward"),
        Ask(minus, "gold_reward", 3, baseline),
        *parts(""),
        Ask("gold reward, greedy", "gold_reward_greedy"),
        Ask(minus, "gold_reward_greedy", 3, baseline),
        *parts("_greedy"),
        Ask("gold reward, held-out use case", "gold_reward_heldout_use_case"),
        "What did it cost? The alignment tax",
        Ask("bits per byte of pretraining text (lower is better)", "pretraining_bits_per_byte"),
        Ask(minus, "pretraining_bits_per_byte", 4, baseline),
        Ask("accuracy on held-out tasks", "heldout_task_accuracy"),
        Ask(minus, "heldout_task_accuracy", 3, baseline),
        "How far did it move?",
        Ask(f"KL to {name}, nats per completion", "kl_to_sft"),
        Ask(f"KL to {name}, nats per token", "kl_to_sft_per_token", 4),
        Ask("reward-model score", "rm_score"),
        Ask("tokens per completion", "completion_tokens", 1),
        Ask("share cut at the length limit", "truncated"),
    ]
