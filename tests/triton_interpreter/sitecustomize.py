"""Lets Model Runner V2 run without a GPU: vLLM only asks for a Triton backend's name, and the interpreter does the rest.

With this folder first on PYTHONPATH and CMC_TEST_TRITON_INTERPRETER=1, every process of an engine believes in a backend
named ``cpu``. Slow; for tests only.
"""

import os

if os.environ.get("CMC_TEST_TRITON_INTERPRETER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class _AlwaysInactive:
        @staticmethod
        def is_active() -> bool:
            return False

    class _InterpretedBackend:
        compiler = None
        driver = _AlwaysInactive

    triton.backends.backends["cpu"] = _InterpretedBackend
