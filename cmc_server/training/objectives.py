"""Training objectives: what each one minimises, its source and its options, as a recipe names them.

The terms are pure functions of logits and labels, see :mod:`cmc_server.training.terms`: p is the template LLM, q the
template LLM steered at strength 1, y the labels; F the answers to forget, R the answers to retain. Means are over
response tokens, for NPO and DPO over answers. A loss is the sum of its terms, each times its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic_core.core_schema import SerializationInfo
from torch import Tensor

from cmc_server.config import FrozenModel
from cmc_server.training.refusals import REFUSALS
from cmc_server.training.terms import (
    Answers,
    ascent,
    label_loss,
    mean,
    negative_preference,
    preference,
    pulled_loss,
    shift_divergence,
    template_divergence,
)

#: Answers by role: ``train``, ``forget``, ``chosen`` and ``rejected``, ``retain``.
Roles = Mapping[str, Answers]


class Objective(FrozenModel):
    """Base of all objectives.

    Args:
        name: as the recipe gives it; a recipe may give the name alone.
    """

    #: Keys of ``data`` that can feed it; a recipe gives exactly one of them.
    main: ClassVar[tuple[str, ...]] = ("forget",)
    #: Whether ``data.retain`` is used.
    retain: ClassVar[Literal["required", "optional", "refused"]] = "optional"
    name: str

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        raise NotImplementedError

    def terms(self, answers: Roles) -> dict[str, Tensor]:
        """Values of each term, by token [N] or by answer [S]; the loss is the weighted sum of their means."""
        return self._terms(answers)

    def weight(self, term: str) -> float:
        """Factor of a term."""
        return float(getattr(self, f"{term}_weight", 1.0))

    def loss(self, answers: Roles) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and the mean of each term without its weight."""
        means = {term: mean(values) for term, values in self.terms(answers).items()}
        weighted = [self.weight(term) * value for term, value in means.items()]
        return sum(weighted[1:], weighted[0]), means

    def measured(self) -> Objective:
        """The objective whose value says how good a delta is: without what only guides the training."""
        return self

    @model_serializer(mode="wrap")
    def _shortest(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        # A recipe that gives the name alone is hashed like that, however many options the objective has by now.
        return self.name if info.exclude_unset and self.model_fields_set <= {"name"} else handler(self)


class InstructionTuning(Objective):
    """L = -mean_t [(1 - a) log q_t[y_t] + a sum_v p_t[v] log q_t[v]] (Cross-model Control, NeurIPS 2024, where a = 0).

    Args:
        name: ``instruction_tuning``.
        template_weight: a, the pull towards the template LLM's own distribution: the gradient is that of
            (1 - a) CE(y, q) + a KL(p || q).
    """

    main = ("train",)
    retain = "refused"
    name: Literal["instruction_tuning"] = "instruction_tuning"
    template_weight: float = Field(default=0.0, ge=0, lt=1)

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"train": pulled_loss(answers["train"], self.template_weight)}

    def measured(self) -> Objective:
        """Without the pull, which belongs to the way and not to the aim."""
        return InstructionTuning()


class _Ascent(Objective):
    forget_bound: float = Field(default=8.0, gt=0)


class GradAscent(_Ascent):
    """L = -mean_F min(-log q_t[y_t], b): gradient ascent on the forget answers (TOFU, COLM 2024), bounded.

    Args:
        name: ``grad_ascent``.
        forget_bound: b, in nats per token; tokens beyond it have no gradient.
    """

    retain = "refused"
    name: Literal["grad_ascent"] = "grad_ascent"

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"forget": ascent(answers["forget"], self.forget_bound)}


class GradDiff(_Ascent):
    """L = -mean_F min(-log q_t[y_t], b) - w mean_R log q_t[y_t] (gradient difference: Liu et al. 2022; TOFU).

    Args:
        name: ``grad_diff``.
        forget_bound: b, in nats per token.
        retain_weight: w.
    """

    retain = "required"
    name: Literal["grad_diff"] = "grad_diff"
    retain_weight: float = Field(default=1.0, gt=0)

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"forget": ascent(answers["forget"], self.forget_bound), "retain": label_loss(answers["retain"])}


class KLRetain(_Ascent):
    """L = -mean_F min(-log q_t[y_t], b) + w mean_R KL(p_t || q_t) (KL minimisation of TOFU, COLM 2024).

    Args:
        name: ``kl_retain``.
        forget_bound: b, in nats per token.
        retain_weight: w.
    """

    retain = "required"
    name: Literal["kl_retain"] = "kl_retain"
    retain_weight: float = Field(default=1.0, gt=0)

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {
            "forget": ascent(answers["forget"], self.forget_bound),
            "retain": template_divergence(answers["retain"]),
        }


class _WithRetain(Objective):
    retain_weight: float = Field(default=1.0, gt=0)

    def _retained(self, answers: Roles) -> dict[str, Tensor]:
        return {"retain": label_loss(answers["retain"])} if "retain" in answers else {}


class NPO(_WithRetain):
    """L = (2 / beta) mean_F log(1 + (q(y) / p(y))^beta) - w mean_R log q_t[y_t].

    Negative preference optimisation (Zhang et al., COLM 2024), with the template LLM alone as reference; bounded by
    itself. Without ``data.retain`` the second term is absent.

    Args:
        name: ``npo``.
        beta: how soon a forgotten answer stops counting; near 0 it becomes plain ascent.
        retain_weight: w.
    """

    name: Literal["npo"] = "npo"
    beta: float = Field(default=0.1, gt=0)

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"forget": negative_preference(answers["forget"], self.beta)} | self._retained(answers)


class _WithRefusals(_WithRetain):
    refusals: tuple[str, ...] = Field(default=REFUSALS, min_length=1)

    @field_validator("refusals")
    @classmethod
    def _not_blank(cls, refusals: tuple[str, ...]) -> tuple[str, ...]:
        if not all(text.strip() for text in refusals):
            raise ValueError("a refusal must not be blank")
        return refusals


class IdK(_WithRefusals):
    """L = -mean_F log q_t[z_t] - w mean_R log q_t[y_t], with z a refusal (the preference for "I don't know" of TOFU).

    Each prompt to forget gets one refusal, drawn with the recipe's seed and kept for the whole run. Without
    ``data.retain`` the second term is absent.

    Args:
        name: ``idk``.
        refusals: what to draw from; a list that ships by default.
        retain_weight: w.
    """

    name: Literal["idk"] = "idk"

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"forget": label_loss(answers["forget"])} | self._retained(answers)


class DPO(_WithRefusals):
    """L = -mean log sigmoid(beta (log q(y_w)/p(y_w) - log q(y_l)/p(y_l))) - w mean_R log q_t[y_t].

    Direct preference optimisation (Rafailov et al., NeurIPS 2023), with the template LLM alone as reference. The pairs
    are chosen and rejected answers in ``data.train``, or refusals over the answers in ``data.forget`` (TOFU).

    Args:
        name: ``dpo``.
        beta: how strongly q is held to p.
        refusals: what to draw from where ``data.forget`` is given, as for ``idk``.
        retain_weight: w; without ``data.retain`` that term is absent.
    """

    main = ("train", "forget")
    name: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"preference": preference(answers["chosen"], answers["rejected"], self.beta)} | self._retained(answers)


class LogitShift(Objective):
    """L = mean_t KL(r_t || q_t): distil the logit shift log r - log p of a tuned LLM r (idea: CMC's rebuttal).

    Of the two ways to write it, this one is KL instead of a distance between centred logits: the delta's optimum is
    the same (the shift, up to a constant), but each token of the vocabulary counts as much as the tuned LLM uses it,
    where a squared distance spends most of itself on tens of thousands of tokens that are never said.

    Args:
        name: ``logit_shift``.
        tuned: folder or hub id of the tuned LLM, of the template's vocabulary; it reads what the template reads.
    """

    main = ("train",)
    retain = "refused"
    name: Literal["logit_shift"] = "logit_shift"
    tuned: str

    def _terms(self, answers: Roles) -> dict[str, Tensor]:
        return {"train": shift_divergence(answers["train"])}


AnyObjective = Annotated[
    InstructionTuning | GradAscent | GradDiff | KLRetain | NPO | IdK | DPO | LogitShift, Field(discriminator="name")
]
