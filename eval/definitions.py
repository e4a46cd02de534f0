"""What every number of the evaluation means and where its definition comes from."""

from prefopt.evaluation.bench_tasks import BENCH_DEFINITIONS

# name: (higher is better, definition, source). A name before the first dot covers the names below it.
DEFINITIONS: dict[str, tuple[bool | None, str, str]] = {
    "rm.accuracy": (
        True,
        "share of strictly ranked pairs that the reward model orders as the labelers did; equal scores count half; "
        "interval over prompts",
        "Ouyang et al. 2022, C.2 and E.2",
    ),
    "rm.gold_accuracy": (
        True,
        "the same accuracy for the gold reward itself: what a perfect reward model could reach on these noisy labels",
        "sandbox",
    ),
    "winrate": (
        True,
        "per prompt 1 if the model's completion has the higher gold reward, .5 if equal, 0 if lower, against the "
        "baseline's; one temperature-1 sample each on the same prompts; interval over prompts",
        "Ouyang et al. 2022, Fig. 1, with the gold reward as the judge",
    ),
    "winrate_greedy": (True, "win rate with greedy completions instead of samples", "as win rate"),
    "winrate_heldout_use_case": (
        True,
        "win rate on prompts of the use case kept out of reward-model and RL training",
        "Ouyang et al. 2022, section 5.3 (generalisation)",
    ),
    "winrate_use_case": (True, "win rate on the prompts of one use case", "as win rate"),
    "gold_reward": (
        True,
        "mean gold reward of one temperature-1 sample per prompt; interval over prompts",
        "sandbox",
    ),
    "gold_reward_greedy": (True, "mean gold reward of the greedy completion", "sandbox"),
    "gold_reward_heldout_use_case": (
        True,
        "mean gold reward on the use case kept out of training",
        "sandbox",
    ),
    "gold_component": (True, "mean of one part of the gold reward over temperature-1 samples", "sandbox"),
    "gold_component_greedy": (True, "mean of one part of the gold reward over greedy completions", "sandbox"),
    "rm_score": (None, "mean reward-model score of temperature-1 samples (what PPO maximises)", "prefopt"),
    "pretraining_bits_per_byte": (
        False,
        "sum of nats / ln 2 / UTF-8 bytes of held-out pretraining text, BOS-conditioned, EOS unscored; interval over "
        "documents",
        "prefopt; the alignment tax of Ouyang et al. 2022, section 4.2",
    ),
    "heldout_task_accuracy": (
        True,
        "share of held-out knowledge tasks whose right choice is the most likely continuation; interval over tasks",
        "prefopt; the alignment tax of Ouyang et al. 2022, section 4.2",
    ),
    "kl_to_sft": (
        None,
        "full-vocabulary KL of the model from the baseline in nats, summed over a completion, mean over "
        "temperature-1 samples; interval over prompts",
        "Ouyang et al. 2022, C.4 (the penalised quantity)",
    ),
    "kl_to_sft_per_token": (None, "the same, divided by tokens", "as kl_to_sft"),
    "completion_tokens": (
        None,
        "mean length of temperature-1 samples in tokens, end token included",
        "prefopt",
    ),
    "truncated": (
        False,
        "share of temperature-1 samples that hit the length limit before they ended",
        "prefopt",
    ),
}

DEFINITIONS |= BENCH_DEFINITIONS
