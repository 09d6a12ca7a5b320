"""What sparsifying a checkpoint reads: the model, its blocks, and texts to calibrate, tune and measure on."""

from __future__ import annotations

import torch
from torch import Tensor

from cmc_server.editing.blocks import decoder_blocks
from cmc_server.editing.models import load_model
from cmc_server.editing.pruning import check_pattern
from cmc_server.editing.sources import Sources
from cmc_server.editing.sparsify_options import SparsifyOptions
from cmc_server.editing.texts import Example, encode_all, packed_sequences, read_texts
from cmc_server.errors import ConfigError

#: Longest calibration sequence unless told otherwise, as published for Wanda and SparseGPT.
LENGTH = 2048


class SparsifyInputs:
    """A model in memory and texts in tokens.

    Args:
        options: what to do.
        sources: the checkpoint, as the only post-trained model without a base.

    Raises:
        EditingError: the model holds NaN or infinity, or cannot be pruned so.
        ConfigError: data cannot be used.
    """

    def __init__(self, options: SparsifyOptions, sources: Sources) -> None:
        self.options, self.checkpoint = options, sources.post
        names = set(self.checkpoint.names)
        for name in self.checkpoint.names:
            self.checkpoint.check_finite(name)
        folder, limit = self.checkpoint.folder, self.checkpoint.config.get("max_position_embeddings") or LENGTH
        self.sequences: list[Tensor] = []
        self.tuning: list[Example] = []
        self.heldout: list[Example] = []
        if options.calibrate is not None:
            examples = encode_all(folder, read_texts(options.calibrate), None)
            length = min(options.length or LENGTH, limit)
            self.sequences = packed_sequences(examples, length, options.sequences, options.seed)
        if options.allocation == "cka" and len(self.sequences) < 2:
            raise ConfigError(f"--allocation cka compares sequences: {options.calibrate} has one, lower --length.")
        if options.tuning_data is not None:
            self.tuning = encode_all(folder, read_texts(options.tuning_data), limit)
        if options.heldout is not None:
            self.heldout = encode_all(folder, read_texts(options.heldout), limit)
        self.model = load_model(self.checkpoint, torch.float32)
        self.blocks = decoder_blocks(self.model, lambda name: name in names and sources.is_chosen(name))
        self.layers = [layer for block in self.blocks for layer in block.layers]
        pattern = options.build_pattern()
        if pattern is not None:
            check_pattern(self.blocks, pattern)
