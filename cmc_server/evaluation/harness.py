"""The lm-evaluation-harness with deltas: ``python -m cmc_server.evaluation.harness --model cmc …``.

The harness knows only the models that are registered in its process, and looks for no plugins. This command registers
``cmc`` and hands everything else over to the harness's own command line::

    python -m cmc_server.evaluation.harness --model cmc --model_args user=FOLDER,delta=NAME=PATH@0.5 --tasks TASK
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cmc_server.errors import CmcError, ConfigError, UserError

if TYPE_CHECKING:
    from cmc_server.evaluation.harness_model import FusedHarnessModel


def register() -> type[FusedHarnessModel]:
    """Make ``cmc`` known to the harness in this process; a second call changes nothing.

    Raises:
        ConfigError: the harness is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  the harness's own models, which it looks up only while it knows none
    except ImportError as error:
        raise ConfigError(
            f"The evaluation harness is not installed ({error}); install it with: pip install 'cmc-server[eval]'."
        ) from None
    from cmc_server.evaluation.harness_model import FusedHarnessModel

    return FusedHarnessModel


def main() -> int:
    """Run the harness's command line on this process's arguments; 2 is what the caller got wrong."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except CmcError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
