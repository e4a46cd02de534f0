"""What every number of the evaluation means and where its definition comes from."""

from prefopt.evaluation.benchmarks.tasks import BENCH_DEFINITIONS

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
        "Ouyang et al. 2022, section 5.3 (generalization)",
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
    "rm_score": (None, "mean reward-model score of temperature-1 samples (what PPO maximizes)", "prefopt"),
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
        "Ouyang et al. 2022, C.4 (the penalized quantity)",
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
    # ---- judge, compare ---------------------------------------------------------------------------------------------
    "winrate_judge": (
        True,
        "win rate as a judge other than the main one sees it, named behind the dot",
        "as win rate",
    ),
    "winrate_labelers": (True, "win rate from the judgements of one group of labelers", "as win rate"),
    "winrate_length_controlled": (
        True,
        "win rate at equal length: sigmoid(theta) of logit P(preferred) = theta + phi tanh(dlen / sd(dlen)), dlen = "
        "difference in characters; interval over prompts",
        "Dubois et al. 2024, arXiv:2404.04475, without prompt difficulty",
    ),
    "bradley_terry": (
        True,
        "strength in log-odds from all pairwise judgements of the main judge, the baseline's being 0; ties half, half "
        "a win added to each side of every pair of models; interval over prompts",
        "Bradley and Terry 1952",
    ),
    "judge_score": (None, "mean score that the judge gave to temperature-1 samples", "prefopt"),
    "judge_consistency": (
        True,
        "share of the pairs on which the language model gives the same verdict with the two answers exchanged; "
        "interval over prompts",
        "Zheng et al. 2023, arXiv:2306.05685, section 3.4",
    ),
    "judge_prefers_first": (
        None,
        "share of its verdicts that the language model gives to the answer shown first; .5 is without bias",
        "Zheng et al. 2023, arXiv:2306.05685, section 3.4",
    ),
    # ---- metadata ---------------------------------------------------------------------------------------------------
    "rating": (True, "mean rating by people, 1 to 7; interval over prompts", "Ouyang et al. 2022, Table 3"),
    "flag": (
        False,
        "share of the labels with this flag, Wilson's interval; hallucination over closed-domain prompts only, the "
        "constraint only where there is one",
        "Ouyang et al. 2022, Table 3 and Fig. 4",
    ),
}

DEFINITIONS |= BENCH_DEFINITIONS

# ---- reward-model, drift, diversity, overopt ------------------------------------------------------------------------
_RANKED = "Ouyang et al. 2022, C.2 and E.2"
DEFINITIONS |= {
    "rm.accuracy_per_prompt": (
        True,
        "mean over prompts of the accuracy within the prompt, as the loss weighs pairs",
        _RANKED,
    ),
    "rm.accuracy_gap": (
        True,
        "accuracy on the pairs whose ranks differ by so many",
        "Llama 2, arXiv:2307.09288, Table 8",
    ),
    "rm.accuracy_labeler": (True, "accuracy on the rankings of one labeler", _RANKED),
    "rm.accuracy_use_case": (True, "accuracy on the rankings of one use case", _RANKED),
    "rm.accuracy_length_matched": (
        True,
        "accuracy on the pairs whose lengths in tokens differ by at most a tenth of the longer one",
        "prefopt",
    ),
    "rm.top1": (
        True,
        "share of prompts on which the completion with the highest score is among those ranked best; equal scores share",
        "RewardBench 2, arXiv:2506.01937",
    ),
    "rm.kendall_tau": (
        True,
        "mean over prompts of the rank correlation tau-b of scores and ranks",
        "Kendall 1945",
    ),
    "rm.brier": (
        False,
        "mean squared error of sigmoid(score of the better - score of the worse); .25 knows nothing",
        "Brier 1950",
    ),
    "rm.nll": (
        False,
        "mean of -log sigmoid(score of the better - score of the worse); log 2 knows nothing",
        "Ouyang et al. 2022, Eq. 1",
    ),
    "rm.ece": (
        False,
        "expected calibration error: mean over ten bins of as many pairs each of |accuracy - confidence|, confidence = "
        "sigmoid(|score difference|)",
        "Guo et al. 2017, arXiv:1706.04599",
    ),
    "rm.calibration_slope": (
        None,
        "factor on score differences that makes them calibrated: 1 is calibrated, below 1 too sure, above not sure enough",
        "Cox 1958",
    ),
    "rm.tie_accuracy": (
        True,
        "accuracy on all pairs, ties included, where scores that differ by less than a width say 'tied'; the width is "
        "the best one on the same pairs",
        "Deutsch et al. 2023, arXiv:2305.14324",
    ),
    "rm.margin_untied": (
        None,
        "mean |score difference| of pairs that the labeler ranked strictly",
        "prefopt",
    ),
    "rm.margin_tied": (None, "mean |score difference| of pairs that the labeler ranked equal", "prefopt"),
    "rm.length_correlation": (
        None,
        "mean over prompts of Spearman's correlation of score and length in tokens among the completions of a prompt; of "
        "the labelers, with their ranks in place of scores",
        "Singhal et al. 2023, arXiv:2310.03716",
    ),
    "rm.agreement": (
        None,
        "share of pairs, untied by two labelers of the group who ranked the same completions, that both order the same way",
        "Ouyang et al. 2022, section 3.4",
    ),
    "rm.agreement_between": (
        None,
        "the same for a labeler of each of two groups",
        "Ouyang et al. 2022, section 3.4",
    ),
    "rm.demonstration_score": (
        None,
        "mean score of the demonstrations, which the reward bias sets to 0",
        "Ouyang et al. 2022, section 3.5",
    ),
    "k1_to_sft": (
        None,
        "log pi(y) - log baseline(y) of the sampled tokens, summed over a completion: the one-sample estimate of kl_to_sft",
        "as kl_to_sft",
    ),
    "k1_to_sft_per_token": (None, "the same, divided by tokens", "as kl_to_sft"),
    "token_entropy": (
        None,
        "entropy in nats of the model's distribution over the whole vocabulary, mean over the tokens of its samples",
        "Kirk et al. 2023, arXiv:2310.06452",
    ),
    "overopt.best_of_n_gold": (
        True,
        "gold reward of the baseline's sample that the reward model likes best of n, minus that of one sample, in standard "
        "deviations of its samples; mean over all subsets of the samples of a prompt",
        "Gao et al. 2022, arXiv:2210.10760",
    ),
    "overopt.best_of_n_proxy": (
        None,
        "the same gain in the reward model's own score",
        "Gao et al. 2022, arXiv:2210.10760",
    ),
    "overopt.best_of_n_fit": (
        None,
        "coefficients of gain = d * (alpha - beta * d), d = sqrt(log n - (n - 1) / n), least squares over n",
        "Gao et al. 2022, arXiv:2210.10760",
    ),
    "overopt.rl_fit": (
        None,
        "coefficients of gain = d * (alpha - beta * log d), d = sqrt(KL), least squares over the rollouts of training; "
        "interval from the errors of the rollouts' means",
        "Gao et al. 2022, arXiv:2210.10760",
    ),
}
for _scope, _over, _interval in (
    ("across_prompts", "over one sample of every prompt", "jackknife over prompts"),
    ("per_prompt", "among the samples of one prompt, mean over prompts", "interval over prompts"),
):
    for _n in (1, 2, 3):
        DEFINITIONS[f"diversity.distinct_{_n}.{_scope}"] = (
            True,
            f"different {_n}-grams / {_n}-grams of words, {_over}; {_interval}; longer texts have less of it",
            "Li et al. 2016, arXiv:1510.03055",
        )
    DEFINITIONS[f"diversity.unique.{_scope}"] = (
        True,
        f"different answers / answers, case and spacing aside, {_over}; {_interval}",
        "Kirk et al. 2023, arXiv:2310.06452",
    )
    DEFINITIONS[f"diversity.self_bleu.{_scope}"] = (
        False,
        "mean BLEU of each answer with the others as its references (100: all alike), "
        + (
            "in random groups of prompts, one sample each; interval over groups"
            if _scope == "across_prompts"
            else f"{_over}; {_interval}"
        ),
        "Zhu et al. 2018, arXiv:1802.01886",
    )
