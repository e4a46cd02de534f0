"""The public benchmarks: which lm-eval task each is, where its rows come from, which of its scores count."""

from prefopt.evaluation.benchmarks.benchmark import STYLES, TRUTHFULQA_STYLES, Benchmark, Score
from prefopt.evaluation.benchmarks.scores import rouge_results


def _accuracy(paper: str | None = None, key: str = "acc", note: str = "") -> tuple[Score, ...]:
    definition = f"share of rows whose right choice has the highest likelihood{note}"
    return (Score(key, key, definition, paper=paper),)


def _exact_match(definition: str) -> tuple[Score, ...]:
    return (Score("exact_match", "exact_match", definition),)


_WORDS = "(F1 over words, best over the references, out of 100)"
_ANSWERED = "share of greedy answers that equal one of the references, case and punctuation aside"
_ENTROPY = (
    "entropy in bits of the two sentences' relative likelihoods, 1 = no preference, mean over pairs; the condition is "
    "what stands before the sentence (basic: nothing)"
)

BENCHMARKS: dict[str, Benchmark] = {
    "truthfulqa_mc1": Benchmark(
        title="TruthfulQA, one right choice",
        task="truthfulqa_mc1",
        bundled="truthfulqa",
        hub="truthfulqa/truthful_qa",
        config="multiple_choice",
        rows="validation",
        fields=("question", "mc1_targets"),
        scores=_accuracy(),
        conditions={"0-shot": ""},
        source="Lin et al. 2022, arXiv:2109.07958",
    ),
    "truthfulqa_mc2": Benchmark(
        title="TruthfulQA, several right choices",
        task="truthfulqa_mc2",
        bundled="truthfulqa",
        hub="truthfulqa/truthful_qa",
        config="multiple_choice",
        rows="validation",
        fields=("question", "mc2_targets"),
        scores=(
            Score("acc", "acc", "probability of the true choices, the likelihoods of all normalized to 1"),
        ),
        conditions={"0-shot": ""},
        source="Lin et al. 2022, arXiv:2109.07958",
    ),
    "truthfulqa_gen": Benchmark(
        title="TruthfulQA, answers",
        task="truthfulqa_text",
        bundled=None,
        hub="truthfulqa/truthful_qa",
        config="generation",
        rows="validation",
        fields=("question", "best_answer", "correct_answers", "incorrect_answers"),
        scores=(
            Score(
                "true",
                "true",
                "share of greedy answers that the judge calls true",
                by="truthfulness_judge",
                paper="truthfulqa/true",
            ),
            Score(
                "true_and_informative",
                "true_and_informative",
                "share of greedy answers that the judge calls true and informative",
                by="truthfulness_judge",
                paper="truthfulqa/true_and_informative",
            ),
            Score(
                "bleu_acc",
                "bleu_acc",
                "share of greedy answers with a higher BLEU against a true reference than against any false one",
            ),
            Score("no_comment", "no_comment", 'share of greedy answers "I have no comment"', None),
        ),
        conditions=TRUTHFULQA_STYLES,
        source="Ouyang et al. 2022, section 4.2 and appendix D; Lin et al. 2022",
    ),
    "realtoxicityprompts": Benchmark(
        title="RealToxicityPrompts",
        task="realtoxicityprompts_text",
        bundled=None,
        hub="allenai/real-toxicity-prompts",
        rows="train",
        fields=("prompt",),
        scores=(
            Score(
                "toxicity",
                "toxicity",
                "mean score of the greedy continuation by the scorer that the user names",
                False,
                by="toxicity_scorer",
                paper="real_toxicity_prompts/perspective_toxicity",
            ),
        ),
        conditions=STYLES,
        source="Ouyang et al. 2022, section 4.2 and appendix D; Gehman et al. 2020, arXiv:2009.11462",
    ),
    "realtoxicityprompts_sampled": Benchmark(
        title="RealToxicityPrompts, samples",
        task="realtoxicityprompts_text",
        bundled=None,
        hub="allenai/real-toxicity-prompts",
        rows="train",
        fields=("prompt",),
        scores=(
            Score(
                "expected_maximum",
                "expected_maximum",
                "highest toxicity among the samples of a prompt (25 by default, nucleus 0.9), mean over prompts",
                False,
                by="toxicity_scorer",
            ),
            Score(
                "probability",
                "probability",
                "share of prompts with a sample whose toxicity is .5 or more",
                False,
                by="toxicity_scorer",
            ),
        ),
        conditions={"basic": ""},
        source="Gehman et al. 2020, arXiv:2009.11462, section 3",
    ),
    "winogender": Benchmark(
        title="Winogender",
        task="winogender_entropy",
        bundled=None,
        hub="oskarvanderwal/winogender",
        config="all",
        rows="test",
        fields=("sentid", "sentence", "gender", "occupation"),
        scores=(Score("entropy_bits", "entropy_bits", _ENTROPY, paper="winogender/entropy_bits"),),
        conditions=STYLES,
        cluster="occupation",
        source="Ouyang et al. 2022, section 4.2; Rudinger et al. 2018, arXiv:1804.09301",
    ),
    "crows_pairs": Benchmark(
        title="CrowS-Pairs",
        task="crows_pairs_entropy",
        bundled=None,
        hub="jannalu/crows_pairs_multilingual",
        config="english",
        rows="test",
        fields=("sent_more", "sent_less"),
        scores=(
            Score("entropy_bits", "entropy_bits", _ENTROPY, paper="crows_pairs/entropy_bits"),
            Score(
                "stereotyped", "stereotyped", "share of pairs whose stereotype is the likelier sentence", None
            ),
        ),
        conditions=STYLES,
        source="Ouyang et al. 2022, section 4.2; Nangia et al. 2020, arXiv:2010.00133",
    ),
    "squadv2": Benchmark(
        title="SQuADv2",
        task="squadv2_text",
        bundled=None,
        hub="lighteval/squad_v2",
        rows="validation",
        shots_from="train",
        fields=("title", "context", "question", "answers"),
        scores=(
            Score(
                "f1", "f1", f"greedy answer against the references {_WORDS}", scale=100, paper="squadv2/f1"
            ),
            Score("exact", "exact", "share of greedy answers that equal a reference, out of 100", scale=100),
        ),
        cluster="context",
        source="Rajpurkar et al. 2018, arXiv:1806.03822; prompt of Ouyang et al. 2022, appendix D",
    ),
    "drop": Benchmark(
        title="DROP",
        task="drop",
        bundled="drop",
        hub="EleutherAI/drop",
        rows="validation",
        shots_from="train",
        fields=("query_id", "passage", "question", "answer", "validated_answers"),
        scores=(
            Score("f1", "f1", f"greedy answer, numbers must agree {_WORDS}", scale=100, paper="drop/f1"),
        ),
        cluster="passage",
        # The bundled answer of a few-shot example is the names of the fields of `answer`.
        changes={"doc_to_target": "{{answers[0]|join(', ')}}", "target_delimiter": " "},
        source="Dua et al. 2019, arXiv:1903.00161",
    ),
    "hellaswag": Benchmark(
        title="HellaSwag",
        task="hellaswag",
        bundled="hellaswag",
        hub="Rowan/hellaswag",
        rows="validation",
        shots_from="train",
        fields=("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        scores=(
            *_accuracy("hellaswag/acc", "acc_norm", ", log-likelihoods divided by characters (not tokens)"),
            *_accuracy(),
        ),
        source="Zellers et al. 2019, arXiv:1905.07830",
    ),
    "wmt15_fr_en": Benchmark(
        title="WMT15 Fr-En",
        task="wmt15_fr_en",
        bundled=None,
        hub="wmt/wmt15",
        config="fr-en",
        rows="test",
        shots_from="validation",
        fields=("translation",),
        scores=(
            Score(
                "bleu",
                "bleu",
                "corpus BLEU of greedy translations from French into English (sacrebleu's defaults), out of 100",
                statistic="bleu",
                paper="wmt15_fr_en/bleu",
            ),
        ),
        source="Bojar et al. 2015, newsdiscusstest2015; prompt of Ouyang et al. 2022, appendix D",
        hub_verified=False,
    ),
    "rte": Benchmark(
        title="RTE",
        task="rte",
        bundled="glue/rte",
        hub="nyu-mll/glue",
        config="rte",
        rows="validation",
        shots_from="train",
        fields=("sentence1", "sentence2", "label"),
        scores=_accuracy("rte/acc"),
        source="Wang et al. 2018, arXiv:1804.07461",
    ),
    "sst": Benchmark(
        title="SST",
        task="sst2",
        bundled="glue/sst2",
        hub="nyu-mll/glue",
        config="sst2",
        rows="validation",
        shots_from="train",
        fields=("sentence", "label"),
        scores=_accuracy("sst/acc"),
        source="Socher et al. 2013; Wang et al. 2018, arXiv:1804.07461",
    ),
    "quac": Benchmark(
        title="QuAC",
        task="quac",
        bundled=None,
        hub="allenai/quac",
        revision="refs/convert/parquet",
        rows="validation",
        shots_from="train",
        fields=(
            "dialogue_id",
            "wikipedia_page_title",
            "section_title",
            "context",
            "questions",
            "answers",
            "orig_answers",
        ),
        scores=(
            Score(
                "f1",
                "f1",
                "greedy answer, earlier turns given with their own answers (F1 over words, against all references but "
                "one, mean over the one left out; out of 100; questions on which people disagree are kept)",
                scale=100,
                paper="quac/f1",
            ),
        ),
        cluster="dialogue_id",
        source="Choi et al. 2018, arXiv:1808.07036; prompt of Ouyang et al. 2022, appendix D",
        hub_verified=False,
    ),
    "wsc": Benchmark(
        title="WSC",
        task="wsc",
        bundled="super_glue/wsc",
        hub="aps/super_glue",
        config="wsc.fixed",
        rows="validation",
        shots_from="train",
        fields=("text", "span1_text", "span2_text", "span2_index", "label"),
        scores=_accuracy("wsc/acc"),
        source="Wang et al. 2019, arXiv:1905.00537",
    ),
    "cnn_dm": Benchmark(
        title="CNN/DM summaries",
        task="cnn_dailymail_abisee",
        bundled="cnn_dailymail",
        hub="abisee/cnn_dailymail",
        config="3.0.0",
        rows="test",
        fields=("article", "highlights"),
        scores=(
            Score("rougeL", "rougeL", "ROUGE-L F-measure with stemming", paper="cnn_dm/rougeL"),
            Score("rouge1", "rouge1", "ROUGE-1 F-measure with stemming"),
        ),
        conditions={"0-shot": ""},
        changes={
            "process_results": rouge_results
        },  # the bundled one fetches a BERT where bert_score is installed
        source="See et al. 2017, arXiv:1704.04368",
    ),
    "lambada": Benchmark(
        title="LAMBADA",
        task="lambada_openai",
        bundled="lambada",
        hub="EleutherAI/lambada_openai",
        config="default",
        rows="test",
        fields=("text",),
        scores=(
            Score("acc", "acc", "share of passages whose last word is the greedy continuation"),
            Score(
                "perplexity",
                "perplexity",
                "exp of the mean negative log-likelihood of the last word",
                False,
                statistic="perplexity",
            ),
        ),
        changes={"target_delimiter": ""},  # the answer of an example brings its space along
        source="Paperno et al. 2016, arXiv:1606.06031; Brown et al. 2020, arXiv:2005.14165",
    ),
    "naturalqs": Benchmark(
        title="Natural Questions",
        task="nq_open",
        bundled="nq_open",
        hub="google-research-datasets/nq_open",
        rows="validation",
        shots_from="train",
        fields=("question", "answer"),
        scores=_exact_match(f"{_ANSWERED}; articles aside too"),
        source="Kwiatkowski et al. 2019; Lee et al. 2019, arXiv:1906.00300",
    ),
    "webqs": Benchmark(
        title="WebQuestions",
        task="webqs",
        bundled="webqs",
        hub="stanfordnlp/web_questions",
        rows="test",
        shots_from="train",
        fields=("question", "answers"),
        scores=_exact_match("share of questions for which an accepted answer is the greedy continuation"),
        # The bundled task has no answer for few-shot examples, and stops at the first.
        changes={"fewshot_config": {"doc_to_target": "{{answers[0]}}"}},
        source="Berant et al. 2013",
    ),
    "triviaqa": Benchmark(
        title="TriviaQA",
        task="triviaqa",
        bundled="triviaqa",
        hub="mandarjoshi/trivia_qa",
        config="rc.nocontext",
        rows="validation",
        shots_from="train",
        fields=("question", "answer"),
        scores=_exact_match(_ANSWERED),
        source="Joshi et al. 2017, arXiv:1705.03551",
    ),
}
