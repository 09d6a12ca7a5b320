"""The logits processor, watched: base rows are compared bit by bit before and after, and counted in a log."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmc_server.integrations.vllm_processor import DeltaLogitsProcessor


class WatchedProcessor(DeltaLogitsProcessor):
    """Writes one JSON line per step to the file that CMC_PARITY_LOG names."""

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        before = logits.clone()
        after = super().apply(logits, ctx)
        steered = self._steered_rows(ctx)
        base = [row for row in range(before.shape[0]) if row not in steered]
        changed = sum(not torch.equal(before[row], after[row]) for row in base)
        entry = {"base_rows": len(base), "changed": changed, "runner": "v1" if ctx is None else "v2"}
        if ctx is not None:  # rows whose last token the host did not know
            entry["unseen"] = sum(tracked.is_unseen for tracked in self._v2._requests.values())
        with Path(os.environ["CMC_PARITY_LOG"]).open("a") as log:
            log.write(json.dumps(entry) + "\n")
        return after

    def _steered_rows(self, ctx: Any) -> set[int]:
        if ctx is None:
            return set(self._v1._batch)
        return {row for row, slot in enumerate(ctx.idx_mapping_np.tolist()) if slot in self._v2._requests}
