"""The blocks of a decoder and their linear layers, run one after the other on sequences, so that each can be pruned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cmc_server.editing.gram import adds_to
from cmc_server.errors import EditingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a block.

    Args:
        name: of its weight in the checkpoint.
        module: torch's ``nn.Linear``, or GPT-2's ``Conv1D``, which keeps its weight as [in, out].
    """

    name: str
    module: nn.Module

    @property
    def parameter(self) -> Tensor:
        """The weight as the module keeps it."""
        weight: Any = self.module.weight
        parameter: Tensor = weight
        return parameter

    @property
    def weight(self) -> Tensor:
        """[out, in], a view of the parameter without its gradient."""
        return self.turned(self.parameter.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        num_out, num_in = self.weight.shape
        return num_out, num_in

    def turned(self, matrix: Tensor) -> Tensor:
        """From the way that the checkpoint keeps it to [out, in], or back."""
        return matrix if isinstance(self.module, nn.Linear) else matrix.T


@dataclass(frozen=True)
class Block:
    """One of the blocks that a decoder is a stack of.

    Args:
        name: in the model.
        module: called with hidden states, [1, length, features], and whatever else it wants.
        layers: to prune; may be empty.
    """

    name: str
    module: nn.Module
    layers: tuple[LinearLayer, ...]

    @property
    def num_weights(self) -> int:
        """Of its layers."""
        return sum(layer.weight.numel() for layer in self.layers)


def decoder_blocks(model: PreTrainedModel, chosen: Callable[[str], bool]) -> list[Block]:
    """The blocks of a model: the longest list of modules with linear layers, in order.

    Args:
        model: a causal language model.
        chosen: whether the weight of a name is to be pruned.

    Raises:
        EditingError: no chosen weight is of a linear layer in a block.
    """
    from transformers.pytorch_utils import Conv1D

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    longest: list[Block] = []
    for name, modules in lists:
        if any(name.startswith(f"{outer}.") for outer, _ in lists):
            continue  # experts of a block, not blocks
        blocks = []
        for index, module in enumerate(modules):
            named = ((f"{name}.{index}.{inner}.weight", one) for inner, one in module.named_modules())
            layers = tuple(LinearLayer(key, one) for key, one in named if isinstance(one, (nn.Linear, Conv1D)))
            blocks.append(Block(f"{name}.{index}", module, layers))
        longest = max(longest, [block for block in blocks if block.layers], key=len)
    taken = [replace(block, layers=tuple(one for one in block.layers if chosen(one.name))) for block in longest]
    if not any(block.layers for block in taken):
        raise EditingError("No weight that is to be pruned belongs to a linear layer of the model's blocks.")
    return taken


class Walk:
    """Sequences on their way through the blocks of a model, which is run once to see how it calls each block.

    Args:
        model: float32 in eval mode.
        blocks: all of it.
        sequences: [1, length] int64, of one length.

    Raises:
        EditingError: the model does not simply call one block after the other, so that they cannot be run one by one.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], sequences: Sequence[Tensor]) -> None:
        self.num_sequences = len(sequences)
        self._inputs: list[Tensor] = []
        self._between: list[list[nn.Module]] = []
        self._calls: dict[tuple[int, int], tuple[tuple[Any, ...], Mapping[str, Any]]] = {}
        for number, ids in enumerate(tqdm(sequences, "inputs", unit="sequence", file=sys.stderr)):
            seen = self._record(model, blocks, ids, number)
            self._inputs.append(seen[0])
            if number == 0:
                self._check(blocks, seen)

    @torch.no_grad()
    def _record(self, model: PreTrainedModel, blocks: Sequence[Block], ids: Tensor, number: int) -> list[Tensor]:
        hidden: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            states = args[0] if args else rest.pop("hidden_states")
            self._calls[len(hidden), number] = (tuple(args[1:]), rest)
            hidden.append(states if not hidden or number == 0 else states[:0])

        hooks = [block.module.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        try:
            model(ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if len(hidden) != len(blocks):
            raise EditingError("The model does not call each of its blocks once; they cannot be pruned in turn.")
        return hidden

    def _check(self, blocks: Sequence[Block], seen: Sequence[Tensor]) -> None:
        states = seen[0]
        for index, block in enumerate(blocks[:-1]):
            states = self._run_one(index, block, 0, states)
            follows = states.shape == seen[index + 1].shape
            # What is not finite is another matter, for pruning to refuse by name.
            if not follows or not torch.allclose(states, seen[index + 1], 1e-3, 1e-4, equal_nan=True):
                raise EditingError(f"{block.name} does not hand its output to the next block as it is.")

    def inputs(self) -> list[Tensor]:
        """What the first block reads, [1, length, features] for each sequence; a list of its own."""
        return list(self._inputs)

    def run(self, index: int, block: Block, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of a block as it now is: the inputs of the next one."""
        return list(self.outputs(index, block, inputs))

    def grams(self, index: int, block: Block, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """X^T X of what each layer of a block reads, [in, in] float32 by the name of its weight."""
        grams = {layer.name: torch.zeros(layer.shape[1], layer.shape[1]) for layer in block.layers}
        hooks = [layer.module.register_forward_pre_hook(adds_to(grams[layer.name])) for layer in block.layers]
        try:
            for _ in self.outputs(index, block, inputs):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return grams

    def outputs(self, index: int, block: Block, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """The same as :meth:`run`, one sequence at a time."""
        for number, states in enumerate(inputs):
            yield self._run_one(index, block, number, states)

    @torch.no_grad()
    def _run_one(self, index: int, block: Block, number: int, states: Tensor) -> Tensor:
        args, kwargs = self._calls[index, number]
        output = block.module(states, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result
