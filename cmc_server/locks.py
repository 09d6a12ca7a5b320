"""A lock between processes that write the same output."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmc_server.errors import UserError


@contextmanager
def exclusive(path: Path, busy: UserError) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends.

    Args:
        path: of a file that nothing else uses, in a folder that exists; it is there only while the lock is held. A file
            of its own, since NFS locks no folders.
        busy: raised if another process holds the lock.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = _acquire(path, busy)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: afterwards it could be another process's
        os.close(descriptor)


def _acquire(path: Path, busy: UserError) -> int:
    while True:
        descriptor, held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held it may have removed the file since we opened it; then we hold nothing.
            held = os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            raise busy from None
        except FileNotFoundError:
            pass
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor
