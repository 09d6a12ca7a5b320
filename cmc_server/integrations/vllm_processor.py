"""The one class that both of vLLM's model runners accept as a custom logits processor.

``--logits-processors cmc_server.integrations.vllm_processor:DeltaLogitsProcessor``, or the same string in
``vllm.LLM(logits_processors=[...])``. V1 calls ``update_state`` and ``apply(logits)``; Model Runner V2 (MRV2) calls
``add_request``, ``apply_staged_writes`` and ``apply(logits, ctx)``. Which runner it is shows in the constructor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from cmc_server.errors import ControlsError
from cmc_server.integrations.request_args import read_controls
from cmc_server.integrations.vllm_v1 import V1Adapter
from cmc_server.integrations.vllm_v2 import V2Adapter
from cmc_server.integrations.vllm_worker import start_deltas

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

#: What goes into ``--logits-processors``.
CLASS_PATH = f"{__name__}:DeltaLogitsProcessor"


class DeltaLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):  # type: ignore[misc]
    """Adds the deltas of every request to its row of logits.

    Args:
        vllm_config: vLLM's configuration; our settings are in its ``additional_config``.
        arguments: ``(device, is_pin_memory)`` under V1, ``(req_states,)`` under MRV2.
    """

    def __init__(self, vllm_config: VllmConfig, *arguments: Any) -> None:
        self._v1: V1Adapter | None = None
        self._v2: V2Adapter | None = None
        if len(arguments) == 1:
            (req_states,) = arguments
            deltas = start_deltas(vllm_config, req_states.device, "v2")
            self._v2 = V2Adapter(deltas, req_states)
        else:
            self._device: torch.device = arguments[0]
            self._v1 = V1Adapter(start_deltas(vllm_config, self._device, "v1"))

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called in the front end when a request arrives.

        Raises:
            ValueError: the steering arguments are malformed.
        """
        try:
            read_controls(sampling_params.extra_args)
        except ControlsError as error:
            raise ValueError(str(error)) from None

    def is_argmax_invariant(self) -> bool:
        """False: a delta may change the best token, so greedy requests must come here too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: before every forward pass; requests came, went or moved."""
        assert self._v1 is not None
        if batch_update is not None:
            self._v1.update(batch_update)
        self._v1.begin(self._device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """MRV2: a request took a slot; whether it is steered."""
        assert self._v2 is not None
        return self._v2.add(req_idx, sampling_params.extra_args)

    def apply_staged_writes(self) -> None:
        """MRV2: before every forward pass."""
        assert self._v2 is not None
        self._v2.fetch()

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Change the steered rows in place.

        Args:
            logits: [B, U] float32.
            ctx: MRV2's layout of the step.
        """
        if self._v2 is not None:
            assert ctx is not None
            return self._v2.apply(logits, ctx)
        assert self._v1 is not None
        return self._v1.apply(logits)
