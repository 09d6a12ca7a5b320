"""Lets a CPU run what vLLM keeps for GPUs. First on PYTHONPATH, this folder reaches every process of an engine.

CMC_TEST_TRITON_INTERPRETER=1 makes Model Runner V2 possible: vLLM only asks for a Triton backend's name, and Triton's
interpreter does the rest. CMC_TEST_ASYNC_SCHEDULING=1 leaves asynchronous scheduling on, which vLLM's CPU platform
switches off. Both are slow; for tests only.
"""

import os
import sys
from importlib.machinery import PathFinder

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


class _AsyncPlatform(PathFinder):
    """Patches ``vllm.platforms.cpu`` right after it is imported."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname != "vllm.platforms.cpu":
            return None
        spec = super().find_spec(fullname, path, target)
        run = spec.loader.exec_module

        def run_and_patch(module):
            run(module)
            update = module.CpuPlatform.check_and_update_config.__func__

            def keep_async(platform, vllm_config):
                update(platform, vllm_config)
                vllm_config.scheduler_config.async_scheduling = True

            module.CpuPlatform.check_and_update_config = classmethod(keep_async)

        spec.loader.exec_module = run_and_patch
        return spec


if os.environ.get("CMC_TEST_ASYNC_SCHEDULING") == "1":
    sys.meta_path.insert(0, _AsyncPlatform)
