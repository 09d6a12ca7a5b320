"""Lets a CPU run what vLLM keeps for GPUs. First on PYTHONPATH, this folder reaches every process of an engine.

CMC_TEST_TRITON_INTERPRETER=1 makes Model Runner V2 possible: vLLM only asks for a Triton backend's name, and Triton's
interpreter does the rest. CMC_TEST_ASYNC_SCHEDULING=1 leaves asynchronous scheduling on, which vLLM's CPU platform
switches off. Both are slow. CMC_TEST_FAULT_RANK=1 lets that rank of tensor parallelism, and no other, fail while it
spells the response of a request whose delta has strength 1.25. CMC_TEST_ANY_WEIGHTS=1 loads weights that are not
finite. For tests only.
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


def _after_import(name, patch):
    """Call ``patch`` with a module right after it is imported."""

    class _Finder(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname != name:
                return None
            spec = super().find_spec(fullname, path, target)
            run = spec.loader.exec_module

            def run_and_patch(module):
                run(module)
                patch(module)

            spec.loader.exec_module = run_and_patch
            return spec

    sys.meta_path.insert(0, _Finder)


def _keep_async(module):
    update = module.CpuPlatform.check_and_update_config.__func__

    def keep_async(platform, vllm_config):
        update(platform, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    module.CpuPlatform.check_and_update_config = classmethod(keep_async)


def _fail_on_a_rank(module):
    extend = module.Stream.extend

    def fail(self, token_ids):
        from vllm.distributed.parallel_state import get_tp_group

        here = get_tp_group().rank_in_group == int(os.environ["CMC_TEST_FAULT_RANK"])
        if here and self.strength == 1.25 and len(token_ids) and len(self.text.ids) > 8:
            raise RuntimeError("injected")
        extend(self, token_ids)

    module.Stream.extend = fail


def _take_any_weights(module):
    module._checked = lambda artifact, model: model.eval().requires_grad_(False)


if os.environ.get("CMC_TEST_ANY_WEIGHTS") == "1":
    _after_import("cmc_server.delta.runner", _take_any_weights)
if os.environ.get("CMC_TEST_ASYNC_SCHEDULING") == "1":
    _after_import("vllm.platforms.cpu", _keep_async)
if "CMC_TEST_FAULT_RANK" in os.environ:
    _after_import("cmc_server.fusion.streams", _fail_on_a_rank)
