"""Generated texts against their references: BLEU and ROUGE-L over a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import RequestError


def score_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Corpus scores of N texts, each from 0 to 100; `references[i]` are those of `hypotheses[i]`.

    A text has one reference or more, not all the same number. What comes back:

    bleu, bleu_signature: BLEU-4 by sacrebleu (Papineni et al. 2002; Post 2018, arXiv:1804.08771),
    its defaults: tokenisation 13a (that of mteval-v13a), case kept, exponential smoothing of orders
    without a match. bleu_any_case, bleu_any_case_signature: the same in lower case, as E2E's own
    scorer counts (`pymteval`), and so the one to compare with published numbers. rouge_l: F of the
    longest common subsequence by rouge_score without stemming, of each text's best reference,
    averaged over texts (Lin 2004); it lower-cases, and drops all but letters and digits. n: N.

    The order of texts and of references does not matter. Raises `RequestError` for no texts, or one
    without references.
    """
    from rouge_score import rouge_scorer
    from sacrebleu.metrics.bleu import BLEU

    hypotheses, references = list(hypotheses), [list(own) for own in references]
    if len(hypotheses) != len(references) or not hypotheses:
        raise RequestError(
            f"{len(hypotheses)} texts and references of {len(references)}; give as many of both, "
            "at least one"
        )
    for number, own in enumerate(references):
        if not own:
            raise RequestError(f"text {number} ({hypotheses[number]!r}) has no reference; give one")
    # sacrebleu takes a stream for each place; None where a text has no reference at it.
    most = max(map(len, references))
    streams: Any = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    scores: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("bleu_any_case", BLEU(lowercase=True))):
        scores[name] = float(metric.corpus_score(hypotheses, streams).score)
        scores[f"{name}_signature"] = str(metric.get_signature())
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [
        scorer.score_multi(own, text)["rougeL"].fmeasure
        for text, own in zip(hypotheses, references, strict=True)
    ]
    return {**scores, "rouge_l": 100.0 * sum(rouge) / len(rouge), "n": len(hypotheses)}
