"""A causal LM in two halves, so that logits over large vocabularies never lie in memory all at once.

The first half reads rows of tokens and gives last hidden states; the second gives the logits of as many states as the
caller can hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmc_server.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens per forward pass, padding included; a single longer row still runs alone.
MAX_TOKENS = 4096
#: Bytes of states that a model keeps, so that a second strength costs no second pass over the user LLM.
KEPT_BYTES = 2**30
#: Rows shorter than this share of the longest one go into a batch of their own.
_LEAST_FILLED = 0.75


#: Ids and positions of a row.
_Key = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One sequence to read.

    Args:
        ids: token ids, at least one.
        positions: where states are wanted.
    """

    ids: Sequence[int]
    positions: Sequence[int]


class SplitModel:
    """A frozen causal LM, split before its output head. States of rows that were read lately are kept.

    Args:
        model: in eval mode, on its device.
        name: what error messages call it.
        kept_bytes: how many bytes of states are kept.

    Raises:
        ConfigError: its logits are not what its head makes of its last hidden states.
    """

    def __init__(self, model: PreTrainedModel, name: str, kept_bytes: int = KEPT_BYTES) -> None:
        self.model = model
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self.kept_bytes, self._used_bytes = kept_bytes, 0
        self._head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self._factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        positions = getattr(config, "max_position_embeddings", None)
        #: Longest input of the architecture; None if its config does not say.
        self.max_positions: int | None = positions if isinstance(positions, int) else None
        self._name = name
        self.num_logits = int(self._head.weight.shape[0])
        self.num_inputs = int(model.get_input_embeddings().weight.shape[0])
        self._check(name)

    def check_length(self, length: int) -> None:
        """Refuse an input that the model was not made for: it would fail, or give anything.

        Raises:
            ConfigError: it is longer than the config allows.
        """
        if self.max_positions is not None and length > self.max_positions:
            raise ConfigError(
                f"An input of {length} tokens is longer than the {self.max_positions} that {self._name} reads; shorten "
                "or leave out the longest texts."
            )

    @torch.inference_mode()
    def states(self, rows: Sequence[Row]) -> list[Tensor]:
        """Last hidden states, batched by length and padded on the right, where causal attention never looks.

        Args:
            rows: sequences of any lengths.

        Returns:
            For each row [len(positions), H] in the model's type, on its device.

        Raises:
            ConfigError: a row is longer than the model reads.
        """
        self.check_length(max((len(row.ids) for row in rows), default=0))
        keys = [(tuple(row.ids), tuple(row.positions)) for row in rows]
        # A dictionary of rows to read also reads a row once that is asked for twice.
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        device = self.model.device
        for batch in similar_lengths([len(ids) for ids, _ in missing], MAX_TOKENS, _LEAST_FILLED):
            longest = max(len(missing[index][0]) for index in batch)
            ids = [[*missing[index][0], *[0] * (longest - len(missing[index][0]))] for index in batch]
            hidden = self.model.base_model(input_ids=torch.tensor(ids, device=device), use_cache=False)[0]
            for place, index in enumerate(batch):
                wanted = torch.tensor(missing[index][1], dtype=torch.int64, device=device)
                found[missing[index]] = hidden[place].index_select(0, wanted)
        for key in missing:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: _Key, states: Tensor) -> None:
        """Keep states in place of the oldest ones; what is larger than all the room is not kept."""
        if states.nbytes > self.kept_bytes:
            return
        while self._used_bytes + states.nbytes > self.kept_bytes:
            self._used_bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = states
        self._used_bytes += states.nbytes

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """The output head: [N, H] to [N, V] float32, scaled and soft-capped as the model's config says."""
        logits: Tensor = self._head(states).float()
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @torch.inference_mode()
    def _check(self, name: str) -> None:
        ids = [(7 * position + 1) % self.num_inputs for position in range(min(5, self.max_positions or 5))]
        expected = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits[0]
        actual = self.logits(self.states([Row(ids, range(len(ids)))])[0])
        tolerance = 1e-4 if expected.dtype == torch.float32 else 0.05
        if not torch.allclose(actual, expected.float(), rtol=tolerance, atol=tolerance):
            raise ConfigError(
                f"{name} ({self.model.config.model_type}) changes its logits behind the output head in a way that "
                "scoring does not know; choose a model whose logits are at most scaled or soft-capped."
            )


def similar_lengths(lengths: Sequence[int], max_tokens: int, least_filled: float = 0.0) -> list[list[int]]:
    """Indices in batches of similar length, the longest first.

    Args:
        lengths: of sequences, in tokens.
        max_tokens: of a batch with its padding; a single longer sequence still makes one.
        least_filled: sequences shorter than this share of a batch's longest one begin another, which bounds what
            padding costs.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= max_tokens
        if fits and lengths[index] >= least_filled * longest:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
