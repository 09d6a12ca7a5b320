"""Terms of the training objectives: pure functions of logits and labels, one value per token or per answer.

Shapes: N response tokens (end of the answer included), V template logits, D delta logits, D <= V, S answers. The
template LLM gives l and p = softmax(l); the delta gives d; steered, by the rule of serving at strength 1,
q = softmax(l + d). Where template and delta have different vocabularies, d goes through the map; columns that pad the
template's logits beyond its vocabulary stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from cmc_server.fusion.rule import Shift, fuse


@dataclass(frozen=True)
class Answers:
    """What the models say at the response tokens of S answers.

    Args:
        template_logits: [N, V], without gradient; None where an LLM is trained itself and d alone is what it says.
        delta_logits: [N, D].
        labels: [N] int64, the tokens that follow.
        rows: [N] int64, ascending: the answer, 0 to S - 1, that a token belongs to.
        tuned_logits: [N, V] of a second, tuned LLM, without gradient, where the objective has one.
        delta_ids: [V'] int64, the vocabulary map; None where template and delta share a vocabulary.
    """

    template_logits: Tensor | None
    delta_logits: Tensor
    labels: Tensor
    rows: Tensor
    tuned_logits: Tensor | None = None
    delta_ids: Tensor | None = None

    @property
    def fused_logits(self) -> Tensor:
        """l + d at strength 1, [N, V] float32."""
        if self.template_logits is None:
            return self.delta_logits.float()
        return fuse(self.template_logits, [Shift(self.delta_logits, self.delta_ids, 1.0)])


def label_loss(answers: Answers) -> Tensor:
    """Cross-entropy of each response token, -log q_t[y_t]: [N]."""
    return cross_entropy(answers.fused_logits, answers.labels, reduction="none")


def pulled_loss(answers: Answers, template_weight: float) -> Tensor:
    """Cross-entropy against a target between label and template, (1 - a) onehot(y_t) + a p_t: [N].

    -(1 - a) log q_t[y_t] - a sum_v p_t[v] log q_t[v]; its gradient is that of (1 - a) CE(y, q) + a KL(p || q).

    Args:
        answers: of one role.
        template_weight: a, in [0, 1).
    """
    if template_weight == 0:
        return label_loss(answers)
    fused = answers.fused_logits
    # Both parts share one normaliser: -sum_v t[v] log q[v] = LSE(z) - sum_v t[v] z[v] for a target t that sums to 1.
    picked = fused.gather(1, answers.labels[:, None]).squeeze(1)
    expected = (_of_template(answers).softmax(-1) * fused).sum(-1)
    return fused.logsumexp(-1) - (1 - template_weight) * picked - template_weight * expected


def ascent(answers: Answers, bound: float) -> Tensor:
    """Minus the cross-entropy, bounded: -min(-log q_t[y_t], b) for each token, [N].

    Beyond b (nats) a token has no gradient: without a bound the loss has no minimum, and ascent diverges.
    """
    return -label_loss(answers).clamp(max=bound)


def template_divergence(answers: Answers) -> Tensor:
    """KL(p_t || q_t), the template LLM against its steered self, for each token: [N]."""
    return _divergence(_of_template(answers), answers.fused_logits)


def shift_divergence(answers: Answers) -> Tensor:
    """KL(r_t || q_t) for each token, with r the tuned LLM's distribution: [N].

    It is 0 where d equals the logit shift log r - log p up to a constant, since q = softmax(log p + d).
    """
    assert answers.tuned_logits is not None
    return _divergence(answers.tuned_logits, answers.fused_logits)


def log_ratios(answers: Answers) -> Tensor:
    """log q(y) - log p(y) for each whole answer, sums over its tokens: [S].

    p is the template LLM alone, the steered model at strength 0: the reference of NPO and DPO.
    """
    template = cross_entropy(_of_template(answers), answers.labels, reduction="none")
    by_token = template - label_loss(answers)
    return by_token.new_zeros(int(answers.rows[-1]) + 1).index_add(0, answers.rows, by_token)


def negative_preference(answers: Answers, beta: float) -> Tensor:
    """(2 / beta) log(1 + (q(y) / p(y))^beta) for each answer: [S]."""
    return (2 / beta) * softplus(beta * log_ratios(answers))


def preference(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """-log sigmoid(beta (log q(y_w)/p(y_w) - log q(y_l)/p(y_l))) for each pair: [S]."""
    return -logsigmoid(beta * (log_ratios(chosen) - log_ratios(rejected)))


def _of_template(answers: Answers) -> Tensor:
    assert answers.template_logits is not None, "train_llm lets no objective through that needs a template"
    return answers.template_logits


def _divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    target = target_logits.log_softmax(-1)
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def mean(values: Tensor) -> Tensor:
    """Mean over tokens or answers, float32."""
    return torch.mean(values.float())
