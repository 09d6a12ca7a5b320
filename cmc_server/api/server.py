"""``cmc-server serve``: vLLM's own OpenAI server, started with the deltas plugged in.

Here, and nowhere else in this package, vLLM's launcher is touched.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from cmc_server.api.options import parse_options
from cmc_server.api.preflight import UserModel, check_deltas, check_names
from cmc_server.api.state import StateFile
from cmc_server.config import ADDITIONAL_CONFIG_KEY, EngineSettings, build
from cmc_server.delta.store import open_delta
from cmc_server.errors import ConfigError, DeltaError, one_line

PLUGIN_NAME: Final = "cmc_server"
# Given as text: the class must be imported by the workers, not by the launcher.
PROCESSOR: Final = "cmc_server.integrations.vllm_processor:DeltaLogitsProcessor"
WORKER_EXTENSION: Final = "cmc_server.integrations.vllm_worker.DeltaWorkerExtension"
LOGPROBS_MODE: Final = "processed_logprobs"
#: Grace for running requests at SIGTERM, the same as Kubernetes gives by default. vLLM's own default aborts them.
SHUTDOWN_SECONDS: Final = 30
#: Holds the key of those who may load and unload deltas. Not an argument: those are logged, and seen by all users.
ADMIN_KEY_VARIABLE: Final = "CMC_SERVER_ADMIN_KEY"
_RUST_VARIABLES: Final = ("VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH")
_ENDPOINT_PLUGINS: Final = "vllm.endpoint_plugins"
#: Where all processes of one server put their metrics, for ``/metrics`` to add up.
METRICS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def run_serve(argv: list[str]) -> int:
    """Serve until told to stop.

    Args:
        argv: what follows ``cmc-server serve`` on the command line.

    Returns:
        The exit code: 0 where it was told to stop, 1 where the engine died, so that a supervisor starts it again.

    Raises:
        UserError: what the user got wrong, as far as it shows before vLLM starts. What vLLM itself finds wrong while
            it starts ends as it does under vLLM.
    """
    settings, rest = parse_options(argv)
    _refuse_environment(os.environ)
    # Read by vLLM when it is first imported, and by every process that it starts.
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"))
    with _metrics_folder(os.environ):
        _start(settings, rest)
    from cmc_server.api.routes import DIED  # imports vLLM, which has been told its settings by now

    if any(DIED.values()):
        _say("cmc-server: the engine died; its log is above.")
        return 1
    return 0


def _start(settings: EngineSettings, rest: Sequence[str]) -> None:
    command, arguments = _parse_vllm(rest)
    _refuse_arguments(arguments)
    settings = _go_live(settings, os.environ, arguments)
    check_names(settings, _served_names(arguments))
    config = _read_model_config(arguments)
    if settings.deltas or settings.live:
        checked = check_deltas(settings, _user_model(arguments, config))
        settings = checked.settings
        _say("\n".join(checked.lines))
    _plug_in(arguments, settings)
    _load_routes()
    command.cmd(arguments)


@contextmanager
def _metrics_folder(environment: MutableMapping[str, str]) -> Iterator[None]:
    """A fresh folder for metrics while the server runs: what an earlier run left would be added up with what is new.

    Prometheus's client reads the variable when it is first imported, which vLLM does.
    """
    given = environment.get(METRICS_VARIABLE)
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cmc-server-metrics-", dir=given, ignore_cleanup_errors=True) as folder:
        environment[METRICS_VARIABLE] = folder
        try:
            yield
        finally:
            del environment[METRICS_VARIABLE]
            if given:
                environment[METRICS_VARIABLE] = given


def _go_live(settings: EngineSettings, environment: Mapping[str, str], arguments: argparse.Namespace) -> EngineSettings:
    """Settings of a server whose deltas may change, with those of its last run; unchanged where they may not.

    Raises:
        ConfigError: the state file cannot be read.
    """
    admin_key = environment.get(ADMIN_KEY_VARIABLE)
    if not admin_key and not settings.watch_folder:
        if settings.state_file or settings.delta_roots:
            raise ConfigError(f"--delta-state and --delta-root need {ADMIN_KEY_VARIABLE} or --watch-deltas.")
        return settings
    keys = [key for key in (arguments.api_key or [environment.get("VLLM_API_KEY")]) if key]
    if admin_key and keys:
        arguments.api_key = [*keys, admin_key]  # or vLLM would not let its holder in
    file = Path(settings.state_file or Path(tempfile.mkdtemp(prefix="cmc-server-")) / "deltas.json").absolute()
    state = StateFile(file).read()
    kept = []
    for source in state.loaded:
        try:
            open_delta(source)
            kept.append(source)
        except DeltaError as error:
            _say(f"warning: the delta {source.name!r} of the last run is not loaded again: {error}")
    if state.loaded or state.unloaded:
        _say(f"deltas of the last run, from {file}: loaded {[one.name for one in kept]}, not {sorted(state.unloaded)}")
    deltas = state.model_copy(update={"loaded": tuple(kept)}).apply(settings)
    return build(EngineSettings, {**dict(settings), "deltas": deltas, "live": True, "state_file": str(file)})


def allowed_plugins(current: str | None) -> str:
    """The value for ``VLLM_PLUGINS``, which is an allow-list for every kind of plugin.

    Args:
        current: its present value. Unset, vLLM loads every installed plugin but those that add HTTP routes, and so
            these are listed.
    """
    if current is not None:
        names = [name for name in current.split(",") if name]
    else:
        groups = [group for group in entry_points().groups if group.startswith("vllm.") and group != _ENDPOINT_PLUGINS]
        names = sorted({entry.name for group in groups for entry in entry_points(group=group)})
    return ",".join([*(name for name in names if name != PLUGIN_NAME), PLUGIN_NAME])


def _refuse_environment(environment: Mapping[str, str]) -> None:
    for variable in _RUST_VARIABLES:
        if environment.get(variable, "0") not in ("", "0"):
            raise ConfigError(f"{variable} is set, but the Rust front end bypasses the deltas; unset it.")


def _parse_vllm(rest: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """vLLM's serve command and its parsed arguments, with our defaults where the user gave none.

    Raises:
        ConfigError: vLLM does not accept the arguments.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="cmc-server")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.usage = "cmc-server serve MODEL [options]"
    serve.epilog = (serve.epilog or "").replace("vllm serve", "cmc-server serve")
    serve.set_defaults(logprobs_mode=LOGPROBS_MODE, shutdown_timeout=SHUTDOWN_SECONDS, model=None)
    parser.error = serve.error = _raise_config_error
    try:
        arguments: argparse.Namespace = parser.parse_args(["serve", *rest])
        arguments.model = arguments.model_tag or arguments.model
        if arguments.model is None:
            raise ConfigError("Name the model to serve: cmc-server serve MODEL.")
        configure_logging_from_args(arguments)
        command.validate(arguments)
    except (ValueError, TypeError, KeyError, OSError, AssertionError) as error:
        raise ConfigError(f"vLLM does not accept these arguments: {one_line(error)}") from None
    return command, arguments


def _raise_config_error(message: str) -> None:
    raise ConfigError(f"{message[:1].upper()}{message[1:].rstrip('.')}.")


def _refuse_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what runs past the deltas or has not been tested with them."""
    speculative = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    refused: list[tuple[bool, str]] = [
        (
            any(getattr(arguments, name, None) is not None for name in speculative),
            "Speculative decoding is not supported with deltas",
        ),
        (bool(arguments.enable_batch_sharded_sampling), "--enable-batch-sharded-sampling is not supported with deltas"),
        (bool(arguments.enable_sleep_mode), "--enable-sleep-mode is not supported with deltas"),
        (bool(arguments.grpc) or arguments.grpc_port is not None, "gRPC bypasses the deltas; serve HTTP only"),
        (arguments.runner == "pooling", "--runner pooling generates no text, so there is nothing to steer"),
        (
            bool(arguments.worker_extension_cls),
            "--worker-extension-cls takes a single class, and the deltas need it; leave it out",
        ),
        (
            ADDITIONAL_CONFIG_KEY in (arguments.additional_config or {}),
            f"--additional-config may not hold {ADDITIONAL_CONFIG_KEY!r}; use the arguments of cmc-server serve",
        ),
    ]
    for is_given, reason in refused:
        if is_given:
            raise ConfigError(f"{reason}.")


def _served_names(arguments: argparse.Namespace) -> set[str]:
    adapters = [module.name for module in arguments.lora_modules or []]
    return {*(arguments.served_model_name or [arguments.model]), *adapters}


def _read_model_config(arguments: argparse.Namespace) -> Any:
    """The configuration of the model that vLLM will load, as vLLM reads it.

    Raises:
        ConfigError: there is no such model, or it brings what the deltas cannot do.
    """
    from vllm.transformers_utils.config import get_config

    overrides = arguments.hf_overrides if isinstance(arguments.hf_overrides, dict) else None
    try:
        config = get_config(
            arguments.model,
            arguments.trust_remote_code,
            arguments.revision,
            arguments.code_revision,
            arguments.config_format,
            hf_overrides_kw=overrides,
        )
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0].strip()
        raise ConfigError(f"The configuration of the model {arguments.model} cannot be read: {reason}") from None
    if getattr(config, "speculators_config", None):
        raise ConfigError(f"{arguments.model} brings a speculator, and speculative decoding is not supported.")
    return config


def _user_model(arguments: argparse.Namespace, config: Any) -> UserModel:
    """What the deltas need to know of the model.

    Raises:
        ConfigError: the engine would run without a tokenizer.
    """
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import get_hf_text_config

    if arguments.skip_tokenizer_init:
        raise ConfigError("Deltas need the model's tokenizer; leave out --skip-tokenizer-init.")
    num_logits = int(get_hf_text_config(config).vocab_size)
    return UserModel(
        tokenizer=arguments.tokenizer or arguments.model,
        num_logits=num_logits,
        chat_template=arguments.chat_template,
        max_num_seqs=arguments.max_num_seqs,
        on_cpu=current_platform.is_cpu(),
    )


def _plug_in(arguments: argparse.Namespace, settings: EngineSettings) -> None:
    """Put the deltas among vLLM's arguments."""
    arguments.logits_processors = [*(arguments.logits_processors or []), PROCESSOR]
    arguments.worker_extension_cls = WORKER_EXTENSION
    own = {ADDITIONAL_CONFIG_KEY: settings.model_dump(mode="json")}
    arguments.additional_config = {**(arguments.additional_config or {}), **own}
    if arguments.logprobs_mode != LOGPROBS_MODE:
        _say(
            f"warning: with --logprobs-mode {arguments.logprobs_mode}, the log probabilities in answers may be "
            f"those of the model without its deltas; {LOGPROBS_MODE} shows the final ones."
        )


def _load_routes() -> None:
    """See that vLLM will find our routes: where it cannot load a plugin it says so in its log, and serves without.

    Raises:
        ConfigError: they cannot be loaded.
    """
    try:
        entry = entry_points(group=_ENDPOINT_PLUGINS)[PLUGIN_NAME]
        entry.load()()
    except Exception as error:  # whatever it is, answers without the deltas would be worse
        raise ConfigError(
            "vLLM cannot load the routes of cmc-server, and would answer without any delta; install cmc-server again: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
