"""The deltas inside a vLLM worker: started with the processor, reached by remote procedure calls."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cmc_server.config import DeltaSource, EngineSettings
from cmc_server.delta.capacity import memory_needed, plan_seqs
from cmc_server.delta.store import one_of_each_vocabulary, open_delta
from cmc_server.delta.trim import trim_memory
from cmc_server.errors import CmcError, ConfigError
from cmc_server.fusion.beside import Beside, spare_cores
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.loaded import DeltaLoader, delta_dtype
from cmc_server.integrations.vllm_shelf import Shelf
from cmc_server.integrations.worker_metrics import publish_metrics
from cmc_server.vocab.surface import load_vocabulary

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.parallel_state import GroupCoordinator

logger = logging.getLogger(__name__)


class WorkerDeltas(DeltaController):
    """A controller with what this worker says about itself.

    Args:
        settings: as the launcher set them.
        runner: which of vLLM's model runners it serves.
    """

    def __init__(self, settings: EngineSettings, runner: Literal["v1", "v2"]) -> None:
        super().__init__(settings.reserved_token_id, _exchange(), _beside(settings), settings.fast_paths)
        self.runner = runner
        self.max_delta_seqs = 0
        #: For deltas that come and go; None where none may, or where this rank holds no deltas.
        self.shelf: Shelf | None = None

    def status(self) -> dict[str, Any]:
        """What the front door compares with its own view."""
        return {
            "processor": True,
            "runner": self.runner,
            "max_delta_seqs": self.max_delta_seqs,
            "deltas": [
                {
                    "name": delta.name,
                    "version": delta.artifact.version,
                    "num_parameters": delta.runner.num_parameters,
                    "memory_bytes": delta.runner.memory_bytes,
                    "dtype": str(delta.runner.dtype).removeprefix("torch."),
                    "coverage": delta.vocab_map.coverage,
                    "match": dict(delta.vocab_map.counts),
                    "requests": self.num_running(delta),
                }
                for delta in self.deltas.values()
            ],
            "kept": [
                {"name": name, "version": version, "requests": self.num_running(delta)}
                for (name, version), delta in self.kept.items()
            ],
        }


#: By which vLLM binds a CPU worker's computing threads, depending on the OpenMP library.
_PLACES = ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
#: The deltas of this worker process; vLLM offers no other way from the worker extension to the processor.
_current: WorkerDeltas | None = None


def start_deltas(vllm_config: VllmConfig, device: torch.device, runner: Literal["v1", "v2"]) -> WorkerDeltas:
    """Load every delta of the settings for this engine's user LLM.

    Raises:
        ConfigError: the settings are invalid, or the engine runs without a tokenizer.
        UserError: a delta cannot be used or does not fit.
    """
    global _current
    settings = EngineSettings.from_additional_config(vllm_config.additional_config)
    deltas = WorkerDeltas(settings, runner)
    if (settings.deltas or settings.live) and _samples_here():
        _load_deltas(deltas, settings, vllm_config, device)
        if deltas.is_leader:
            publish_metrics(deltas)
    _current = deltas
    return deltas


def _load_deltas(deltas: WorkerDeltas, settings: EngineSettings, vllm_config: VllmConfig, device: torch.device) -> None:
    model = vllm_config.model_config
    if model.skip_tokenizer_init:
        raise ConfigError("Deltas need the user LLM's tokenizer; start without --skip-tokenizer-init.")
    if vllm_config.speculative_config is not None:
        raise ConfigError("Speculative decoding is not supported with deltas; start without it.")
    user = load_vocabulary(str(model.tokenizer))
    artifacts = [open_delta(source) for source in settings.deltas]
    value_bytes, on_cpu = delta_dtype(settings, device).itemsize, device.type == "cpu"
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    max_seqs = deltas.max_delta_seqs = plan_seqs(settings, artifacts, max_num_seqs, value_bytes, on_cpu)
    loader = DeltaLoader(user, settings, max_seqs=max_seqs, device=device)
    for artifact in artifacts:
        loaded = loader.load(artifact)
        deltas.load(loaded)
        logger.info("Delta %s (version %s) is ready.", loaded.name, loaded.artifact.version)
    if settings.live:
        _read_vocabularies(loader, settings)
        trim_memory()  # what starting has left free: else the first delta to be loaded hands it back, and steps wait
        deltas.shelf = Shelf(
            deltas,
            loader.load,
            lambda artifact: memory_needed(artifact, max_seqs, value_bytes, on_cpu),
            int(settings.delta_memory * 2**30),
            Beside(_spare_cores() or frozenset(os.sched_getaffinity(0))),
            device,
        )


def _read_vocabularies(loader: DeltaLoader, settings: EngineSettings) -> None:
    """Read now what deltas under --delta-root will need, since running answers would wait for it later."""
    for artifact in one_of_each_vocabulary(map(Path, settings.delta_roots)):
        try:
            loader.keep_words(artifact)
        except CmcError as error:
            logger.warning("The vocabulary of %s cannot be used: %s", artifact.path, error)


def _beside(settings: EngineSettings) -> Beside | None:
    """A thread for the deltas on the cores that vLLM leaves free; None where there are none.

    vLLM starts its CPU workers with computing threads bound to cores, and keeps at least one core for the scheduler,
    which mostly waits for the worker.
    """
    if "overlap" not in settings.fast_paths:
        return None
    cores = _spare_cores()
    if not cores:
        return None
    logger.info("Deltas run beside the user LLM, on core %s.", ", ".join(map(str, sorted(cores))))
    return Beside(cores)


def _spare_cores() -> frozenset[int]:
    placed = next((os.environ[name] for name in _PLACES if name in os.environ), None)
    return spare_cores(placed, frozenset(os.sched_getaffinity(os.getppid())))


def _samples_here() -> bool:
    """Whether this rank samples: under pipeline parallelism only the last one does."""
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


class _TensorParallel:
    """The exchange between the ranks of vLLM's tensor-parallel group."""

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group

    @property
    def is_leader(self) -> bool:
        return bool(self._group.is_first_rank)

    def broadcast(self, tensor: Tensor) -> None:
        self._group.broadcast(tensor)

    def add(self, tensor: Tensor) -> Tensor:
        total: Tensor = self._group.all_reduce(tensor)
        return total


def _exchange() -> _TensorParallel | None:
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return _TensorParallel(group) if group.world_size > 1 else None


class DeltaWorkerExtension:
    """Methods that ``--worker-extension-cls`` adds to vLLM's worker, for ``collective_rpc``."""

    def cmc_status(self) -> dict[str, Any]:
        """Whether the processor is there, and which deltas it has loaded."""
        return {"processor": False, "runner": None, "deltas": []} if _current is None else _current.status()

    def cmc_prepare(self, source: dict[str, Any], version: str) -> dict[str, Any]:
        """Begin to load a delta beside the steps; how far it is, see :meth:`Shelf.state`."""
        shelf = _shelf()
        if shelf is None:
            return {"state": "ready"}
        delta = DeltaSource.model_validate(source)
        try:
            shelf.prepare(delta, version)
        except CmcError as error:
            return {"state": "failed", "reason": str(error), "status": error.http_status}
        return shelf.state(delta.name)

    def cmc_state(self, name: str) -> dict[str, Any]:
        """How far a delta is."""
        shelf = _shelf()
        return {"state": "ready"} if shelf is None else shelf.state(name)

    def cmc_discard(self, name: str) -> None:
        """Forget a delta that was being loaded."""
        shelf = _shelf()
        if shelf is not None:
            shelf.discard(name)

    def cmc_commit(self, name: str, version: str) -> dict[str, Any]:
        """Put a prepared delta into use; the status after it."""
        shelf = _shelf()
        if shelf is not None:
            shelf.commit(name, version)
        return self.cmc_status()

    def cmc_unload(self, name: str) -> dict[str, Any]:
        """Take a delta out of use; the status after it."""
        if _shelf() is not None and _current is not None and name in _current.deltas:
            _current.unload(name)
        return self.cmc_status()

    def cmc_retire(self, name: str, version: str) -> None:
        """Forget a delta that was replaced or unloaded, as soon as no request runs on it."""
        if _shelf() is not None and _current is not None:
            _current.retire(name, version)


def _shelf() -> Shelf | None:
    return None if _current is None else _current.shelf
