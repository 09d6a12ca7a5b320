from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import import_benchmark
from steered import Steered

from cmc_server.config import DeltaSource
from cmc_server.delta.store import DeltaArtifact, content_version, one_of_each_vocabulary, open_delta
from cmc_server.errors import ConfigError, DeltaError, DeltaNotFoundError, UserError


@pytest.fixture
def folder(steered: Steered, tmp_path: Path) -> Path:
    """A copy of a delta that a test may break."""
    return Path(shutil.copytree(steered.deltas["other"], tmp_path / "delta"))


def opened(folder: Path | str, **options: object) -> DeltaArtifact:
    return open_delta(DeltaSource(name="d", path=str(folder)), **options)  # type: ignore[arg-type]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_described(folder: Path) -> None:
    artifact = opened(folder)
    assert (artifact.context_length, artifact.max_positions, artifact.strength) == (48, 512, 1.0)
    assert artifact.weight_bytes == (folder / "model.safetensors").stat().st_size
    (folder / "cmc_delta.json").unlink()
    plain = opened(folder)
    assert (plain.context_length, plain.version != artifact.version) == (512, True)


def test_files_that_are_not_read_count_for_nothing(folder: Path) -> None:
    before = opened(folder)
    shutil.copy(folder / "model.safetensors", folder / "adapter.safetensors")
    after = opened(folder)
    assert (after.weight_bytes, after.num_weights) == (before.weight_bytes, before.num_weights)


def test_the_version_is_the_content(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("says nothing to the model")
    assert content_version(copy) == content_version(folder)
    edit_config(copy, rope_theta=1.0)
    assert content_version(copy) != content_version(folder)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "code": (lambda f: edit_config(f, auto_map={"AutoModel": "x.Y"}), "must not bring code"),
    "no vocabulary size": (lambda f: edit_config(f, vocab_size=None), "vocab_size"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no model.safetensors"),
    "corrupt weights": (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "not a valid safetensors file"),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "missing from the delta folder",
    ),
    "shard elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../f/model.safetensors"}}'),
        "missing from the delta folder",
    ),
    "another name": (lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"), "no model.safetensors"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "safetensors index"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_wrong_is_said_in_one_sentence(folder: Path, name: str) -> None:
    breakage, words = BREAKAGES[name]
    breakage(folder)
    with pytest.raises(DeltaError) as caught:
        opened(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_missing_or_too_large(folder: Path) -> None:
    edit_config(folder, vocab_size=10)
    with pytest.raises(DeltaError, match="only 10 logits"):
        opened(folder).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DeltaError, match="no usable tokenizer"):
        opened(folder).tokenizer()


def test_paths(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeltaNotFoundError, match="does not exist"):
        opened("/nowhere")
    with pytest.raises(DeltaNotFoundError, match="can be reached"):
        opened("nobody/nothing")
    with pytest.raises(DeltaError, match="not a folder"):
        opened(folder / "config.json")
    with pytest.raises(DeltaError, match="outside the allowed folders"):
        opened(folder, roots=[tmp_path / "allowed"])
    with pytest.raises(DeltaNotFoundError, match="must lie in an allowed folder"):
        opened("nobody/nothing", roots=[tmp_path])
    assert opened(folder, roots=[tmp_path]).path == folder.resolve()


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "/tmp/" + "x" * 300, "a\0b"])
def test_paths_that_no_system_reads(path: str) -> None:
    with pytest.raises(DeltaNotFoundError, match=r"cannot be reached|does not exist"):
        opened(path)


def test_a_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("cmc_server.delta.store.content_version", denied)
    with pytest.raises(DeltaError, match=r"cannot be read: .*Permission denied"):
        opened(folder)


def test_a_window_that_the_model_does_not_have(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=40)
    with pytest.raises(DeltaError, match="context_length of 48, but the model reads at most 40 tokens"):
        opened(folder)


def test_a_link_does_not_lead_out_of_the_allowed_folders(folder: Path, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(folder)
    with pytest.raises(DeltaError, match="outside the allowed folders"):
        opened(allowed / "link", roots=[allowed])


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a=/x", "/x", None),
        ("a=/x@0.5", "/x", 0.5),
        ("a=/x@y@-1", "/x@y", -1.0),
        ("a=/x@v2", "/x@v2", None),
        ("a=@1", "@1", None),
    ],
)
def test_sources_on_the_command_line(text: str, path: str, strength: float | None) -> None:
    assert DeltaSource.parse(text) == DeltaSource(name="a", path=path, strength=strength)


@pytest.mark.parametrize("text", ["a", "a=", "=x", "a b=/x", "-a=/x", f"{'a' * 65}=/x"])
def test_sources_that_are_malformed(text: str) -> None:
    with pytest.raises(ConfigError):
        DeltaSource.parse(text)


def test_folders_broken_at_random(steered: Steered, tmp_path: Path) -> None:
    """Every one is refused in one line, whatever is wrong; but a flipped bit may also change a weight a little."""
    breakages = import_benchmark("breakages")
    draw = random.Random(1)
    for number in range(10 * len(breakages.BREAKAGES)):
        breakage = breakages.BREAKAGES[number % len(breakages.BREAKAGES)]
        folder = Path(shutil.copytree(steered.deltas["other"], tmp_path / str(number)))
        breakage(folder, draw)
        try:
            Steered(steered.user, {"d": folder}).load("d")
        except UserError as error:
            assert "\n" not in str(error), error
        else:
            assert breakage is breakages.flip, f"{breakage.__name__}, folder {number}"


def test_links_are_followed_within_the_allowed_folders_only(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path.parent / "secret.json"
    secret.write_text("{}")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert opened(folder, roots=[tmp_path]).path == folder.resolve()
    (folder / "cmc_delta.json").unlink()
    (folder / "cmc_delta.json").symlink_to(secret)
    with pytest.raises(DeltaError, match="link that leads outside"):
        opened(folder, roots=[tmp_path])


def test_one_delta_of_each_vocabulary(steered: Steered, tmp_path: Path) -> None:
    for name, source in (("a", "words"), ("b", "words"), ("c", "other"), ("d", "other")):
        shutil.copytree(steered.deltas[source], tmp_path / name)
    (tmp_path / "c" / "config.json").unlink()
    (tmp_path / "a file").touch()
    found = one_of_each_vocabulary([tmp_path, tmp_path / "missing"])
    assert [artifact.path.name for artifact in found] == ["a", "d"]
    assert [artifact.path.name for artifact in one_of_each_vocabulary([tmp_path], most=1)] == ["a"]
