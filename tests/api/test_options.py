"""The arguments of ``cmc-server serve`` and what is checked before vLLM starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from tiny_models import make_delta, make_tokenizer

from cmc_server.api.options import parse_options
from cmc_server.api.preflight import UserModel, check_deltas, check_names
from cmc_server.api.server import allowed_plugins, run_serve
from cmc_server.api.words import delta_words, user_vocabulary
from cmc_server.config import DeltaDose, DeltaSource, EngineSettings
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.store import open_delta
from cmc_server.errors import CapacityError, ConfigError, DeltaError, UserError
from cmc_server.vocab.surface import load_vocabulary


def test_ours_are_taken_out_and_the_rest_keeps_its_order() -> None:
    argv = [
        "model", "--port", "0", "--delta", "a=x@0.5", "--hf-overrides", '{"a": -1}', "--delta=b=org/b", "-tp", "2",
        "--strength-bounds", "-2", "3", "--max-deltas", "7", "--max-delta-seqs", "9", "--delta-memory", "0.5",
        "--delta-dtype", "float32", "--min-coverage", "0.1", "--force-coverage", "--map-overrides", "o.json",
        "--access-log-format", "json", "--default-delta", "a@2", "--require-delta=b", "--require-delta", "a@-1",
        "--delta-cache-dir", "cache", "--delta-fast-paths", "rule,head", "--served-model-name", "m1", "m2", "-1",
    ]  # fmt: skip
    settings, rest = parse_options(argv)
    assert rest == ["model", "--port", "0", "--hf-overrides", '{"a": -1}', "-tp", "2",
                    "--served-model-name", "m1", "m2", "-1"]  # fmt: skip
    assert settings == EngineSettings(
        deltas=(DeltaSource(name="a", path="x", strength=0.5), DeltaSource(name="b", path="org/b")),
        default_deltas=(DeltaDose(name="a", strength=2),),
        required_deltas=(DeltaDose(name="b"), DeltaDose(name="a", strength=-1)),
        strength_bounds=(-2, 3),
        max_deltas_per_request=7,
        max_delta_seqs=9,
        delta_memory=0.5,
        delta_dtype="float32",
        min_coverage=0.1,
        force_coverage=True,
        map_overrides="o.json",
        access_log_format="json",
        cache_dir="cache",
        fast_paths=frozenset({"rule", "head"}),
    )


def test_nothing_given_is_the_default() -> None:
    assert parse_options(["model", "--dtype", "float32"]) == (EngineSettings(), ["model", "--dtype", "float32"])


def test_no_fast_path_at_all() -> None:
    settings, _ = parse_options(["model", "--delta-fast-paths", "none"])
    assert settings.fast_paths == frozenset()
    assert EngineSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize("bounds", [["--strength-bounds", "-1,2"], ["--strength-bounds=-1,2"]])
def test_bounds_in_one_word(bounds: list[str]) -> None:
    settings, rest = parse_options([*bounds, "model"])
    assert (settings.strength_bounds, rest) == ((-1.0, 2.0), ["model"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["m", "--delta", "noequals"], "NAME=PATH"),
        (["m", "--delta", "a b=x"], "must match"),
        (["m", "--delta", "a=x", "--delta", "a=y"], "more than once"),
        (["m", "--delta", "a=x@9"], "within -4.0 and 4.0"),
        (["m", "--delta"], "expected one argument"),
        (["m", "--strength-bounds", "1", "2"], "contains 0"),
        (["m", "--strength-bounds", "x", "2"], "two numbers"),
        (["m", "--max-deltas", "many"], "invalid int"),
        (["m", "--max-deltas", "0"], "greater than or equal to 1"),
        (["m", "--delta-memory", "nan"], "finite"),
        (["m", "--delta-dtype", "int8"], "float32"),
        (["m", "--delta-fast-paths", "head,warp"], "'overlap'"),
        (["m", "--default-delta", "a"], "default delta 'a' is not among"),
        (["m", "--delta", "a=x", "--require-delta", "b@1"], "required delta 'b' is not among"),
        (["m", "--delta", "a=x", "--require-delta", "a@"], "NAME@STRENGTH"),
        (["m", "--delta", "a=x", "--require-delta", "a@1", "--require-delta", "a@2"], "more than once"),
        (["m", "--delta", "a=x", "--require-delta", "a@9"], "within"),
        (["m", "--delta", "a=x", "--require-delta", "a@0"], "would change nothing"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_serve(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for expected in ("--delta NAME=PATH[@STRENGTH]", "--max-delta-seqs", "vLLM", "--help=all"):
        assert expected in text


@pytest.mark.parametrize("variable", ["VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH"])
def test_a_front_end_that_bypasses_python(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match="Rust"):
        run_serve(["model"])


def test_plugins_that_were_allowed_stay_allowed() -> None:
    assert allowed_plugins("") == "cmc_server"
    assert allowed_plugins("mine") == "mine,cmc_server"
    assert allowed_plugins("cmc_server,mine") == "mine,cmc_server"
    installed = allowed_plugins(None).split(",")
    assert installed[-1] == "cmc_server"
    assert "lora_filesystem_resolver" in installed  # comes with vLLM, which loads it unless told otherwise


def test_names_of_models_are_taken() -> None:
    settings = EngineSettings(deltas=(DeltaSource(name="a", path="x"),))
    check_names(settings, ["b"])
    with pytest.raises(ConfigError, match="served model"):
        check_names(settings, ["b", "a"])


def settings_for(folder: Path, cache: Path, **values: object) -> EngineSettings:
    source = {"name": "tiny", "path": str(folder)}
    return EngineSettings.model_validate({"deltas": [source], "cache_dir": str(cache), **values})


def test_a_delta_that_fits(tiny_delta: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    size = load_vocabulary(str(tiny_tokenizer)).size
    checked = check_deltas(settings_for(tiny_delta, tmp_path), UserModel(str(tiny_tokenizer), size))
    assert checked.settings.reserved_token_id == 3  # <spare>
    (line,) = checked.lines
    assert line.startswith("delta tiny: version ")
    assert "coverage 100.0%, strength 1," in line
    template = "{{ '<spare>' }}"
    path = tmp_path / "template.jinja"
    path.write_text(template)
    for override in (template, str(path)):
        model = UserModel(str(tiny_tokenizer), size, override)
        assert check_deltas(settings_for(tiny_delta, tmp_path), model).settings.reserved_token_id == 1  # bos
    padded = UserModel(str(tiny_tokenizer), size + 8)
    assert check_deltas(settings_for(tiny_delta, tmp_path), padded).settings.reserved_token_id == size


def test_what_is_read_before_the_start_is_not_read_again(
    tiny_delta: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = UserModel(str(tiny_tokenizer), 400)
    live = {"live": True, "state_file": str(tmp_path / "state.json")}
    checked = check_deltas(settings_for(tiny_delta, tmp_path, **live), model)
    artifact = open_delta(checked.settings.deltas[0])
    assert [*map(id, checked.held)] == [id(delta_words(artifact)), id(user_vocabulary(model.tokenizer))]
    # A server whose deltas stay never asks for the user LLM's vocabulary again.
    still = check_deltas(settings_for(tiny_delta, tmp_path), model)
    assert [*map(id, still.held)] == [id(delta_words(artifact))]


def test_coverage(tiny_tokenizer: Path, tmp_path: Path) -> None:
    backend = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    foreign = shutil.copytree(tiny_tokenizer, tmp_path / "foreign")
    tokens = {chr(0x4E00 + token): token for token in backend["model"]["vocab"].values()}
    backend["model"].update(vocab=tokens, merges=[])
    backend.update(pre_tokenizer=None, decoder=None, added_tokens=[])
    (foreign / "tokenizer.json").write_text(json.dumps(backend))
    (foreign / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    delta = make_delta(tmp_path / "delta", foreign)
    model = UserModel(str(tiny_tokenizer), 410)
    with pytest.raises(DeltaError, match="force-coverage"):
        check_deltas(settings_for(delta, tmp_path), model)
    assert check_deltas(settings_for(delta, tmp_path, force_coverage=True), model).lines


def test_a_strength_outside_the_bounds(tiny_tokenizer: Path, tmp_path: Path) -> None:
    delta = make_delta(tmp_path / "delta", tiny_tokenizer, manifest=DeltaManifest(default_strength=5))
    with pytest.raises(ConfigError, match="outside -4 to 4"):
        check_deltas(settings_for(delta, tmp_path), UserModel(str(tiny_tokenizer), 400))


def test_a_required_delta_must_do_something(tiny_delta: Path, tiny_tokenizer: Path) -> None:
    deltas = (DeltaSource(name="tiny", path=str(tiny_delta), strength=0),)
    settings = EngineSettings(deltas=deltas, required_deltas=(DeltaDose(name="tiny"),))
    with pytest.raises(ConfigError, match="tiny@STRENGTH"):
        check_deltas(settings, UserModel(str(tiny_tokenizer), 400))


def test_memory(tiny_delta: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = UserModel(str(tiny_tokenizer), 400, max_num_seqs=64)
    check_deltas(settings_for(tiny_delta, tmp_path, delta_memory=0.002), model)  # some rows fit
    for values in ({"delta_memory": 0.002, "max_delta_seqs": 64}, {"delta_memory": 1e-6}):
        with pytest.raises(CapacityError, match="GiB"):
            check_deltas(settings_for(tiny_delta, tmp_path, **values), model)
    narrow = UserModel(str(tiny_tokenizer), 400, max_num_seqs=64, on_cpu=False)
    check_deltas(settings_for(tiny_delta, tmp_path, delta_memory=0.006, max_delta_seqs=64), narrow)
    with pytest.raises(CapacityError):
        check_deltas(settings_for(tiny_delta, tmp_path, delta_memory=0.006, max_delta_seqs=64), model)


def spoil(folder: Path, how: str) -> None:
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "corrupt weights":
        (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "remote code":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    elif how == "bad manifest":
        (folder / "cmc_delta.json").write_text('{"unmapped": "perhaps"}')
    elif how == "small vocabulary":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10}))
    else:
        shutil.rmtree(folder)
        if how == "a file":
            save_file({}, folder)


@pytest.mark.parametrize(
    "how",
    [
        "no config",
        "no weights",
        "corrupt weights",
        "no tokenizer",
        "remote code",
        "bad manifest",
        "small vocabulary",
        "no folder",
        "a file",
    ],
)
def test_a_delta_that_cannot_be_used(how: str, tiny_delta: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_delta, tmp_path / "spoilt")
    spoil(folder, how)
    with pytest.raises(UserError) as caught:
        check_deltas(settings_for(folder, tmp_path), UserModel(str(tiny_tokenizer), 400))
    assert "\n" not in str(caught.value)


def test_a_user_model_without_a_tokenizer(tiny_delta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        check_deltas(settings_for(tiny_delta, tmp_path), UserModel(str(tmp_path), 400))


def test_tokenizer_folders_are_reproducible(tmp_path: Path, tiny_tokenizer: Path) -> None:
    again = make_tokenizer(tmp_path / "again")
    assert (again / "tokenizer.json").read_text() == (tiny_tokenizer / "tokenizer.json").read_text()
