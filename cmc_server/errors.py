"""Every exception that cmc_server raises on purpose.

    CmcError
    ├── UserError                what the caller got wrong: exit code 2, or a 4xx answer
    │   ├── ConfigError          a setting or a combination of settings
    │   ├── DeltaError           a delta artifact that cannot be used
    │   │   └── DeltaNotFoundError
    │   ├── MapError             a vocabulary map that cannot be built, read or used
    │   ├── EditingError         a checkpoint that cannot be edited, or an edit that cannot be made of it
    │   ├── ControlsError        the steering part of a request
    │   └── CapacityError        a limit fixed at start would be exceeded (HTTP 409)
    └── DeltaRuntimeError        a delta failed inside the engine while a request ran (HTTP 500)

A message is one sentence that names the field or file and says what to do.
"""

from __future__ import annotations


class CmcError(Exception):
    """Base of all errors of this package."""

    http_status = 500


class UserError(CmcError):
    """Something the caller can correct."""

    http_status = 400


class ConfigError(UserError):
    """A setting is invalid, or settings do not fit together."""


class DeltaError(UserError):
    """A delta artifact is incomplete, unsafe, corrupt or does not fit."""


class DeltaNotFoundError(DeltaError):
    """No delta of that name or path exists."""

    http_status = 404


class MapError(UserError):
    """A vocabulary map cannot be built, read or used."""


class EditingError(UserError):
    """A checkpoint cannot be edited, or checkpoints do not fit together."""


class ControlsError(UserError):
    """The steering part of a request is invalid.

    Args:
        message: one sentence for the client.
        param: the field of the request body that is at fault, such as ``cmc.deltas[0].strength``.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CapacityError(UserError):
    """A limit fixed at start (memory, rows, number of deltas) would be exceeded."""

    http_status = 409


class DeltaRuntimeError(CmcError):
    """A delta failed while a request was running in the engine."""


def one_line(error: BaseException) -> str:
    """What another library says went wrong, as part of one sentence, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
