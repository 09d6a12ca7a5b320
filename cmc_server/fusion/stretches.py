"""Which inputs a delta must read to score a whole continuation, as few as its spelling allows.

At step t of a continuation a delta reads ``delta_input(prompt, y_1..y_t)``, cut to its window. As long as each input
begins with the one before, one causal pass over the longest gives the logits of all: a *stretch*. It ends where a token
makes the delta spell earlier text anew, or where the window moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cmc_server.delta.spelling import DeltaInput, Speller
from cmc_server.delta.window import window_drop


@dataclass
class Stretch:
    """One input and the steps that its positions serve.

    Args:
        ids: what is read.
        served: (position in ``ids``, step) by rising step; the logits at the position are those of the step.
    """

    ids: list[int]
    served: list[tuple[int, int]] = field(default_factory=list)


def windowed_inputs(
    speller: Speller,
    prompt_ids: Sequence[int],
    response: Sequence[int],
    *,
    bos_ids: Sequence[int],
    context_length: int,
) -> Iterator[list[int]]:
    """What a delta reads before each token of a response, spelled incrementally.

    Args:
        speller: for the pair of vocabularies.
        prompt_ids: the prompt in delta tokens.
        response: user token ids.
        bos_ids: the delta's bos, or nothing; it stays when the window moves.
        context_length: the delta's window, in tokens.

    Yields:
        One list of delta ids per token of the response; each is a list of its own, possibly empty.
    """
    text = DeltaInput(speller, prompt_ids)
    for user_id in response:
        yield cut_to_window(text.ids, bos_ids, context_length)
        text.extend([user_id])


def cut_to_window(ids: Sequence[int], bos_ids: Sequence[int], context_length: int) -> list[int]:
    """Keep a leading bos and drop the tokens behind it, in steps of half a window, until the rest fits."""
    num_bos = len(bos_ids) if list(ids[: len(bos_ids)]) == list(bos_ids) else 0
    return [*ids[:num_bos], *ids[num_bos + window_drop(len(ids), context_length) :]]


def plan_stretches(inputs: Iterable[Sequence[int]]) -> list[Stretch]:
    """Group the inputs of successive steps into stretches, greedily.

    Args:
        inputs: the delta ids that are read at steps 0, 1, 2, …

    Returns:
        Stretches by rising step. A step with input x is served once, at the position ``len(x) - 1`` of a stretch
        whose ids begin with x; a step that reads nothing is in none.
    """
    stretches: list[Stretch] = []
    for step, ids in enumerate(inputs):
        if not ids:
            continue
        if not stretches or not _one_extends_the_other(stretches[-1].ids, ids):
            stretches.append(Stretch([]))
        stretch = stretches[-1]
        stretch.ids.extend(ids[len(stretch.ids) :])
        stretch.served.append((len(ids) - 1, step))
    return stretches


def _one_extends_the_other(first: Sequence[int], second: Sequence[int]) -> bool:
    shared = min(len(first), len(second))
    return list(first[:shared]) == list(second[:shared])
