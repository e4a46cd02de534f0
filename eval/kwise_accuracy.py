"""K-wise accuracy as an `evaluate.Metric`; `evaluate.load` takes the path of this file, offline too."""

import datasets
import evaluate

from prefopt.errors import UserError
from prefopt.statistics.rankings import pair_accuracy

_DESCRIPTION = """\
K-wise accuracy: the share of strictly ranked pairs among the K completions of a prompt that the scores order as the
labeler did, an equal score counting one half. Every pair weighs the same. The 95 % interval is from a bootstrap over
prompts, because the pairs of one prompt are correlated.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`): per prompt, the scores of its K completions; K may differ.
    references (`list` of `list` of `int`): per prompt, their ranks: 1 = best, equal = tie, below 1 = absent.

Returns:
    accuracy (`float`): pairs in the right order / strict pairs; NaN if there are none.
    accuracy_ci_low, accuracy_ci_high (`float`): its 95 % interval; NaN for fewer than two prompts.
    num_pairs (`int`): strict pairs.
    num_prompts (`int`): prompts that have one.

Example:

    >>> from prefopt.evaluation.kwise_accuracy import KwiseAccuracy
    >>> result = KwiseAccuracy().compute(predictions=[[3.0, 2.0, 1.0], [0.0, 5.0]], references=[[1, 2, 2], [2, 1]])
    >>> result["accuracy"], result["num_pairs"], result["num_prompts"]  # B and C are tied in the first
    (1.0, 3, 2)
"""

_CITATION = """\
@article{ouyang2022training,
  title   = {Training language models to follow instructions with human feedback},
  author  = {Ouyang, Long and Wu, Jeff and Jiang, Xu and others},
  journal = {arXiv preprint arXiv:2203.02155},
  year    = {2022}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class KwiseAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    # not int64, to which `evaluate` would round a rank of 1.5 before anyone can refuse it
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2203.02155"],
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float | int]:
        for prompt, ranks in enumerate(references):
            if any(rank != int(rank) for rank in ranks):
                raise UserError(f"prompt {prompt}: ranks must be whole numbers, got {list(ranks)}")
        estimate = pair_accuracy(predictions, references)
        return {
            "accuracy": estimate.value,
            "accuracy_ci_low": estimate.ci_low,
            "accuracy_ci_high": estimate.ci_high,
            "num_pairs": estimate.n,
            "num_prompts": estimate.n_clusters,
        }
