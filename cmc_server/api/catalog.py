"""The deltas that this process offers: what the front door, the routes and the readiness check share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cmc_server.api.controls import ChosenDelta, DeltaOffer, Offer
from cmc_server.api.messages import Chat
from cmc_server.api.words import DeltaWords, delta_words
from cmc_server.config import EngineSettings
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.errors import ControlsError, DeltaError
from cmc_server.integrations.vllm_engine import ServedModels

_ENCODING_THREADS = 4


@dataclass(frozen=True)
class ServedDelta:
    """A delta as the API process knows it: its artifact, and an encoder for its prompts."""

    artifact: DeltaArtifact
    encoder: PromptEncoder
    words: DeltaWords

    @property
    def offer(self) -> DeltaOffer:
        """What a request needs to know of it."""
        artifact = self.artifact
        return DeltaOffer(artifact.name, artifact.version, artifact.strength, artifact.manifest.unmapped)

    def encode(self, chat: Chat) -> tuple[int, ...]:
        """The chat's prompt in the delta's tokens.

        Raises:
            ControlsError: the delta's template or tokenizer cannot read the messages.
        """
        try:
            with self.words.lock:
                return tuple(self.encoder.encode_messages(chat.messages, **chat.options))
        except (DeltaError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            # Text that no UTF-8 can hold, such as half of a surrogate pair; or whatever a template runs into.
            raise ControlsError(
                f"The delta {self.artifact.name!r} cannot read these messages: {error}", "messages"
            ) from None


class Catalog:
    """The served deltas by name.

    Args:
        settings: the server's settings.
        served: the models that vLLM serves.

    Raises:
        DeltaError: a delta cannot be opened.
    """

    def __init__(self, settings: EngineSettings, served: ServedModels) -> None:
        self.served = served
        #: Replaced as a whole when a delta comes or goes: whoever holds it sees one state.
        self.deltas: Mapping[str, ServedDelta] = {source.name: serve(open_delta(source)) for source in settings.deltas}
        self.offer = Offer(
            deltas={name: delta.offer for name, delta in self.deltas.items()},
            base_model=served.base_ids[0],
            is_served=served.__contains__,
            bounds=settings.strength_bounds,
            max_deltas=settings.max_deltas_per_request,
            defaults=settings.default_deltas,
            required=settings.required_deltas,
        )
        self._threads = ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="cmc-prompt")

    @property
    def max_rows(self) -> int | None:
        """Steered rows that this process may run at once; None is without limit."""
        return self.offer.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        self.offer = replace(self.offer, max_rows=rows)

    @property
    def versions(self) -> Mapping[str, str]:
        """Version by name."""
        return {name: delta.artifact.version for name, delta in self.deltas.items()}

    def put(self, delta: ServedDelta) -> None:
        """Offer a delta, in place of one of the same name."""
        self._offer_only({**self.deltas, delta.artifact.name: delta})

    def remove(self, name: str) -> None:
        """Offer a delta no longer."""
        self._offer_only({key: delta for key, delta in self.deltas.items() if key != name})

    def _offer_only(self, deltas: Mapping[str, ServedDelta]) -> None:
        self.deltas = deltas
        self.offer = replace(self.offer, deltas={name: delta.offer for name, delta in deltas.items()})

    async def encode(self, deltas: Sequence[ChosenDelta], chat: Chat) -> list[tuple[int, ...]]:
        """The chat in each delta's tokens, off the event loop.

        Raises:
            ControlsError: a delta cannot read the messages.
        """
        loop = asyncio.get_running_loop()
        jobs = (loop.run_in_executor(self._threads, self.deltas[delta.name].encode, chat) for delta in deltas)
        return list(await asyncio.gather(*jobs))


def serve(artifact: DeltaArtifact) -> ServedDelta:
    """A delta with its prompt encoder.

    Raises:
        DeltaError: its tokenizer cannot be used.
    """
    words = delta_words(artifact)
    return ServedDelta(artifact, PromptEncoder(words.tokenizer, artifact.manifest), words)
