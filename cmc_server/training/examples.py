"""Records encoded for every reader: the template LLMs in their chat template, the delta in its own."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cmc_server.delta.prompt import PromptEncoder
from cmc_server.errors import ConfigError
from cmc_server.training.batches import Example, Item, Reading, TrainingSet
from cmc_server.training.bridge import Bridge
from cmc_server.training.data import Prompt, Record, Records
from cmc_server.training.hidden_cache import HiddenCache
from cmc_server.training.objectives import DPO, IdK, Objective
from cmc_server.training.template import FrozenTemplate

#: A prompt with one answer.
Pair = tuple[Prompt, str]


class ExampleEncoder:
    """Encodes answers for all readers of a run.

    Args:
        templates: the frozen template LLMs; the delta has the vocabulary of the first one.
        tuned: the tuned LLM of the objective, if it has one; it reads what the first template reads.
        encoder: the delta's own prompt encoder, the one that serves it.
        cache: keeps the hidden states.
        max_length: records in which the delta would read more tokens are left out.

    Raises:
        ConfigError: the tuned LLM has another vocabulary than the first template.
    """

    def __init__(
        self,
        templates: Sequence[FrozenTemplate],
        tuned: FrozenTemplate | None,
        encoder: PromptEncoder,
        cache: HiddenCache,
        max_length: int,
    ) -> None:
        self.templates, self.tuned = templates, tuned
        self._encoder, self._cache, self._max_length = encoder, cache, max_length
        own = templates[0].tokenizer.get_vocab()
        if tuned is not None and tuned.tokenizer.get_vocab() != own:
            raise ConfigError(
                f"The LLMs {templates[0].name} and {tuned.name} have different vocabularies; objective.tuned must be a "
                "tuned copy of the template."
            )
        self.bridges = {
            k: Bridge.between(template, templates[0])
            for k, template in enumerate(templates)
            if template.tokenizer.get_vocab() != own
        }

    def encode(self, roles: Mapping[str, Sequence[Pair]]) -> list[Item]:
        """Items of one example for each role.

        Args:
            roles: for each role its answers, all of one length: item i has the i-th of each.

        Raises:
            ConfigError: no item is short enough, a template has no embedding of a token, the templates spell an answer
            differently, or the cache is too small.
        """
        encoded = {role: [self._encode(*pair) for pair in pairs] for role, pairs in roles.items()}
        items = [dict(zip(encoded, examples, strict=True)) for examples in zip(*encoded.values(), strict=True)]
        fitting = [item for item in items if all(len(one.delta_ids) < self._max_length for one in item.values())]
        if not fitting:
            raise ConfigError(f"No record fits into data.max_length = {self._max_length} tokens; raise it.")
        if len(fitting) < len(items):
            message = f"{len(items) - len(fitting)} of {len(items)} records exceed data.max_length and are left out."
            warnings.warn(message, stacklevel=2)
        for k, template in enumerate(self.templates):
            fitting = _read_by(template, k, fitting)
        if self.tuned is not None:
            fitting = _read_by(self.tuned, 0, fitting)
        # One call for all, so that one file holds them.
        flat = iter(self._with_states([example for item in fitting for example in item.values()]))
        return [{role: next(flat) for role in item} for item in fitting]

    def _encode(self, prompt: Prompt, answer: str) -> Example:
        ids, response = self.templates[0].encode(prompt, answer)
        delta_prompt = self._of_text(ids) if isinstance(prompt, str) else self._encoder.encode_messages(prompt)
        if not delta_prompt:
            raise ConfigError(f"output.prompt_template renders nothing for the record with the answer {answer[:80]!r}.")
        # The label of position t is token t + 1; the last token is only ever a label.
        delta_ids = [*delta_prompt, *response[:-1]]
        readings = tuple(
            self._reading(k, prompt, answer, delta_ids, len(delta_prompt)) for k in range(len(self.templates))
        )
        return Example(delta_ids, readings)

    def _of_text(self, ids: Sequence[int]) -> list[int]:
        """What the delta reads of a plain text: the template's ids, with its own bos in place of the template's."""
        bos = self.templates[0].tokenizer.bos_token_id
        return [*self._encoder.bos_ids, *(ids[1:] if bos is not None and ids[0] == bos else ids)]

    def _reading(self, k: int, prompt: Prompt, answer: str, delta_ids: list[int], num_prompt: int) -> Reading:
        template = self.templates[k]
        # Each template ends its answers in its own way; the delta never reads that last token.
        ids, labels = template.encode(prompt, answer)
        template.check_ids([*ids, *labels])
        reading = Reading([*ids, *labels[:-1]], len(ids) - 1, labels, list(range(num_prompt - 1, len(delta_ids))))
        if k in self.bridges:
            steps, positions = zip(*self.bridges[k].served(delta_ids[:num_prompt], labels, delta_ids), strict=True)
            labels = [labels[step] for step in steps]
            return replace(reading, labels=labels, positions=list(positions), steps=list(steps))
        if labels[:-1] != delta_ids[num_prompt:]:
            raise ConfigError(f"The LLMs {self.templates[0].name} and {template.name} spell {answer!r} apart.")
        return reading

    def _with_states(self, examples: list[Example]) -> list[Example]:
        readings = [list(example.readings) for example in examples]
        for k, template in enumerate(self.templates):
            for kept, field in ((template, "hidden"), (self.tuned, "tuned")):
                if kept is None:
                    continue
                states = self._cache.states(kept, [row[k].ids for row in readings], [row[k].start for row in readings])
                for row, one in zip(readings, states or [], strict=states is not None):
                    row[k] = replace(row[k], hidden=one) if field == "hidden" else replace(row[k], tuned=one)
        return [replace(example, readings=tuple(row)) for example, row in zip(examples, readings, strict=True)]


def _read_by(llm: FrozenTemplate, k: int, items: list[dict[str, Example]]) -> list[dict[str, Example]]:
    """The items, as encoded for template ``k``, that an LLM can read; others are left out, with a warning.

    Raises:
        ConfigError: it can read none.
    """
    limit = llm.max_positions
    fitting = [
        item for item in items if limit is None or all(len(one.readings[k].ids) <= limit for one in item.values())
    ]
    if not fitting:
        raise ConfigError(f"No record fits into the {limit} tokens that {llm.name} reads; give shorter ones.")
    if len(fitting) < len(items):
        left = f"{len(items) - len(fitting)} of {len(items)} records exceed the {limit} tokens that {llm.name} reads"
        warnings.warn(f"{left} and are left out.", stacklevel=3)
    return fitting


def training_set(
    encoder: ExampleEncoder, objective: Objective, main: str, sources: Mapping[str, Records], seed: int
) -> TrainingSet:
    """The items that an objective learns from.

    Args:
        encoder: of the run.
        objective: of the recipe.
        main: the key of its main data in ``sources``.
        sources: records by key of ``data``.
        seed: of the refusals and of the draws from ``retain``.

    Raises:
        ConfigError: as :meth:`ExampleEncoder.encode`.
    """
    items = encoder.encode(roles_of(objective, main, sources[main].items, seed))
    retain = []
    if "retain" in sources:
        pairs = [(record.prompt, record.answer) for record in sources["retain"].items]
        retain = [item["retain"] for item in encoder.encode({"retain": pairs})]
    return TrainingSet(items, retain, seed)


def roles_of(objective: Objective, main: str, records: Sequence[Record], seed: int) -> dict[str, list[Pair]]:
    """The answers of an objective's main data, by the role that they play in it."""
    answers = [(record.prompt, record.answer) for record in records]
    if isinstance(objective, IdK):
        return {"forget": _refused(objective.refusals, records, seed)}
    if isinstance(objective, DPO) and main == "forget":
        return {"chosen": _refused(objective.refusals, records, seed), "rejected": answers}
    if isinstance(objective, DPO):
        return {"chosen": answers, "rejected": [(record.prompt, record.rejected or "") for record in records]}
    return {main: answers}


def _refused(refusals: Sequence[str], records: Sequence[Record], seed: int) -> list[Pair]:
    if any(isinstance(record.prompt, str) for record in records):
        raise ConfigError("Plain texts cannot be refused; give data.forget chats or prompts for this objective.")
    draw = random.Random(f"refusals {seed}")  # noqa: S311 (not for secrets)
    return [(record.prompt, draw.choice(refusals)) for record in records]
