"""What Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155v1) measured: other models and other data, for orientation only.

All values are those of the 175B models. Figures 3, 4 and 5 have no table in the paper; their values were read off the
vector graphics and are exact to about the third decimal.
"""

MARK = "175B, different data"
MODELS = ("base", "sft", "ppo", "ppo_ptx")  # order of the columns below; base is GPT-3

# Table 14: task/metric -> prompt style or number of shots -> GPT-3, SFT, PPO, PPO-ptx. Accuracies, entropies (bits),
# toxicity and ROUGE-L out of 1, F1 and BLEU out of 100. Left out is TL;DR, whose row repeats that of CNN/DM digit for
# digit. The rows "instruction" and "QA+instruct" of TruthfulQA look swapped in the paper; they stand here as printed.
TABLE_14: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "winogender/entropy_bits": {
        "basic": (0.735, 0.503, 0.618, 0.737),
        "respectful": (0.796, 0.479, 0.527, 0.696),
        "biased": (0.783, 0.54, 0.564, 0.69),
    },
    "crows_pairs/entropy_bits": {
        "basic": (0.41, 0.241, 0.326, 0.413),
        "respectful": (0.362, 0.204, 0.27, 0.243),
        "biased": (0.353, 0.187, 0.223, 0.205),
    },
    "real_toxicity_prompts/perspective_toxicity": {
        "basic": (0.231, 0.211, 0.228, 0.234),
        "respectful": (0.233, 0.199, 0.205, 0.196),
        "biased": (0.285, 0.256, 0.427, 0.4),
    },
    "truthfulqa/true": {
        "QAprompt": (0.284, 0.515, 0.755, 0.712),
        "instruction": (0.57, 0.665, 0.879, 0.815),
        "QA+instruct": (0.438, 0.852, 0.944, 0.61),
    },
    "truthfulqa/true_and_informative": {
        "QAprompt": (0.251, 0.271, 0.752, 0.689),
        "instruction": (0.226, 0.257, 0.382, 0.494),
        "QA+instruct": (0.242, 0.206, 0.588, 0.315),
    },
    "hellaswag/acc": {"zero-shot": (0.781, 0.753, 0.743, 0.807), "few-shot": (0.791, 0.741, 0.759, 0.82)},
    "wsc/acc": {"zero-shot": (0.74, 0.654, 0.683, 0.731), "few-shot": (0.798, 0.779, 0.654, 0.788)},
    "rte/acc": {"zero-shot": (0.563, 0.57, 0.704, 0.668), "few-shot": (0.614, 0.7, 0.711, 0.765)},
    "sst/acc": {"zero-shot": (0.898, 0.907, 0.92, 0.9), "few-shot": (0.944, 0.936, 0.944, 0.938)},
    "quac/f1": {"zero-shot": (42.55, 45.22, 34.52, 41.6), "few-shot": (45.38, 48.77, 36.0, 46.99)},
    "squadv2/f1": {"zero-shot": (64.3, 57.67, 43.68, 59.85), "few-shot": (69.75, 65.9, 51.95, 69.93)},
    "drop/f1": {"zero-shot": (27.53, 15.79, 13.08, 15.23), "few-shot": (35.27, 35.85, 27.78, 33.34)},
    "wmt15_fr_en/bleu": {"zero-shot": (38.92, 36.9, 24.16, 34.28), "few-shot": (39.93, 35.07, 26.58, 36.76)},
    "cnn_dm/rougeL": {"default": (0.196, 0.225, 0.227, 0.22)},
}

# Fig. 4: share of outputs (API distribution) with the property: SFT, PPO, PPO-ptx.
FIG_4 = {
    "attempts_correct_instruction": (0.864, 0.923, 0.928),
    "follows_explicit_constraints": (0.34, 0.435, 0.433),
    "hallucination": (0.084, 0.215, 0.156),
    "appropriate_for_customer_assistant": (0.88, 0.904, 0.903),
}

# Fig. 5: mean rating on the scale from 1 to 7 of SFT, PPO (not shown) and PPO-ptx.
FIG_5 = (4.08, None, 4.82)

# Fig. 3: win rate over SFT on InstructGPT prompts, held-out labelers; SFT is the baseline itself.
FIG_3 = {"base": 0.252, "base_prompted": 0.431, "sft": 0.5, "ppo": 0.690, "ppo_ptx": 0.708}

# Section 4.1 and E.2: accuracy of the reward model, and half the width of its interval.
REWARD_ACCURACY = {"train_labelers": (0.724, 0.004), "heldout_labelers": (0.696, 0.009)}


def table_14(task: str, condition: str, model: str) -> float | None:
    """The value of Table 14, or None where the paper has none.

    >>> table_14("squadv2/f1", "zero-shot", "ppo_ptx")
    59.85
    """
    row = TABLE_14.get(task, {}).get(condition)
    return row[MODELS.index(model)] if row is not None and model in MODELS else None
