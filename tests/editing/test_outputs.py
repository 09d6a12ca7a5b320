"""Outputs of edits, merges and measurements: whole or not there, with a record, and never in place of what is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cmc_server.cli import main
from cmc_server.editing.parts import part_folder
from cmc_server.editing.writing import check_output, check_record, write_provenance
from cmc_server.errors import EditingError


def check(output: Path, *read: Path | None, force: bool = True, dry_run: bool = False) -> None:
    check_output(output, read, force=force, dry_run=dry_run)


def test_an_output_that_is_in_the_way(base: Path, post: Path, tmp_path: Path) -> None:
    check(tmp_path / "new", base, post, None, force=False)
    with pytest.raises(EditingError, match="exists; give another one, or --force"):
        check(shutil.copytree(base, tmp_path / "old"), base, post, force=False)
    check(tmp_path / "old", base, post)
    (tmp_path / "old" / "config.json").unlink()
    with pytest.raises(EditingError, match="is not a checkpoint folder"):
        check(tmp_path / "old", base, post)


def test_an_output_that_would_remove_what_is_read(base: Path, post: Path, tmp_path: Path) -> None:
    inside = shutil.copytree(post, base / "checkpoint-5")
    data = base / "data.jsonl"
    data.touch()
    for output, read in (
        (tmp_path / "x" / ".." / "post", post),
        (base, inside),
        (base, data),
        (tmp_path / "edited", shutil.copytree(post, tmp_path / ".edited.old")),
    ):
        with pytest.raises(EditingError, match=f"would remove {read}, which is read; give another output"):
            check(output, tmp_path / "data.jsonl", read)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "weights").symlink_to(base / "model.safetensors")
    with pytest.raises(EditingError, match=r"would remove .*links/weights, which is read"):
        check(base, tmp_path / "links")
    check(base / "new", base, post, data)


@pytest.mark.parametrize("name", ["src", "checkpoint-5", ".git"])
def test_only_a_checkpoint_and_nothing_else_is_replaced(base: Path, name: str) -> None:
    for known in ("additional_chat_templates", "sparsity"):
        (base / known).mkdir()
    check(base)
    (base / name).mkdir()
    with pytest.raises(EditingError, match=f"base holds {name}, so that --force does not replace it"):
        check(base)
    (base / name).rmdir()
    (base / "model.safetensors").unlink()
    with pytest.raises(EditingError, match=r"is not a checkpoint folder with config\.json and safetensors"):
        check(base)


def test_a_link_as_the_output_stays_a_link(base: Path, post: Path, tmp_path: Path) -> None:
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to("base")
    dangling.symlink_to("nowhere")
    with pytest.raises(EditingError, match="which is read"):
        check(link, base)
    for output, target in ((link, base), (link, base), (dangling, tmp_path / "nowhere")):
        check(output, post)
        with part_folder(output, force=True) as part:
            (part / "config.json").write_text("new", "utf-8")
            (part / "model.safetensors").touch()
        assert output.is_symlink() and (target / "config.json").read_text("utf-8") == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "post", "link", "dangling", "nowhere"}
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(EditingError, match="circle' cannot be used"):
        check(tmp_path / "circle", post)


def test_one_run_at_a_time_writes_an_output(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with part_folder(output, force=False) as part:
        (part / "config.json").write_text("first", "utf-8")
        with pytest.raises(EditingError, match="Another run is writing"):
            check(output, base)
        with pytest.raises(EditingError, match="Another run is writing"), part_folder(output, force=True):
            pass
    assert (output / "config.json").read_text("utf-8") == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "output"}


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "output"
    for force, message in ((False, "exists; give another one"), (True, "is not a checkpoint folder")):
        with pytest.raises(EditingError, match=message), part_folder(output, force=force) as part:
            (part / "config.json").write_text("new", "utf-8")
            output.mkdir()
            (output / "notes").touch()
        assert [path.name for path in tmp_path.rglob("*")] == ["output", "notes"]
        shutil.rmtree(output)


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_what_was_there_comes_back_at_once_if_it_cannot_be_replaced(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    before, rename = sorted(path.name for path in base.iterdir()), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".base.part":
            raise failure("stop")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EditingError if failure is OSError else failure), part_folder(base, force=True):
        pass
    assert sorted(path.name for path in base.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, EditingError, OSError])
def test_an_interrupted_run_leaves_what_was_there(tmp_path: Path, interruption: type[BaseException]) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("old", "utf-8")
    (output / "model.safetensors").touch()
    (tmp_path / ".output.part" / "sparsity").mkdir(parents=True)  # of a run that was killed
    (tmp_path / ".output.lock").touch()
    expected = EditingError if interruption is OSError else interruption
    with pytest.raises(expected), part_folder(output, force=True) as part:
        (part / "model.safetensors").write_bytes(b"half")
        raise interruption("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert (output / "config.json").read_text("utf-8") == "old"
    output.rename(tmp_path / ".output.old")  # killed while it was being replaced
    check(output, dry_run=True)
    assert not output.exists()
    with pytest.raises(expected), part_folder(output, force=True):
        raise interruption("stop")
    assert (output / "config.json").read_text("utf-8") == "old"
    output.rename(tmp_path / ".output.old")
    with pytest.raises(EditingError, match="exists; give another one"):
        check(output, force=False)
    assert (output / "config.json").read_text("utf-8") == "old"
    with part_folder(output, force=True) as part:
        (part / "config.json").write_text("new", "utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert (output / "config.json").read_text("utf-8") == "new"


def test_edits_are_listed_in_order(tmp_path: Path) -> None:
    for name, content in (("plain", None), ("delta", '{"name": "x", "training": {"seed": 1}}')):
        folder = tmp_path / name
        folder.mkdir()
        if content:
            (folder / "cmc_delta.json").write_text(content, "utf-8")
        for number in (1, 2):
            write_provenance(folder, {"method": f"m{number}"})
    edits = [{"method": "m1"}, {"method": "m2"}]
    assert json.loads((tmp_path / "plain" / "cmc_edit.json").read_text("utf-8")) == {"edits": edits}
    manifest = json.loads((tmp_path / "delta" / "cmc_delta.json").read_text("utf-8"))
    assert manifest == {"name": "x", "training": {"seed": 1, "edits": edits}}
    (tmp_path / "delta" / "cmc_delta.json").write_text('{"training": {"edits": 3}}', "utf-8")
    with pytest.raises(EditingError, match="must list earlier edits"):
        write_provenance(tmp_path / "delta", {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cmc_delta.json", '{"training": []}', "must hold a JSON object under 'training'"),
        ("cmc_delta.json", '{"training": null}', "must hold a JSON object under 'training'"),
        ("cmc_delta.json", '{"training": {"edits": null}}', "must list earlier edits"),
        ("cmc_delta.json", "[]", "must hold a JSON object."),
        ("cmc_delta.json", "{", "cannot be read as JSON"),
        ("cmc_edit.json", '{"edits": {}}', "must list earlier edits"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    check_record(tmp_path)
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(EditingError, match=f"{tmp_path / name} {message}"):
        check_record(tmp_path)
    assert (tmp_path / name).read_text("utf-8") == content


@pytest.mark.parametrize(
    "command", ["edit zero {post} --method expo", "merge zero {post} --method fisher --curvature x"]
)
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_a_broken_record_is_found_before_anything_is_read(
    post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, dry: str
) -> None:
    (post / "cmc_delta.json").write_text('{"training": []}', "utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert main([*command.format(post=post).split(), "-o", str(tmp_path / "edited"), *dry.split()]) == 2
    assert f"{post / 'cmc_delta.json'} must hold a JSON object under 'training'" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "edit {post} {inside} --method expo",
        "edit {inside} {post} --method expo",
        "edit {post} {post} --method ties --with {inside}",
        "edit zero {post} --method expo --analyse {data}",
        "edit zero {post} --method bitdelta --calibrate {data}",
        "merge {post} {inside} --method task-arithmetic",
        "merge {post} {inside} --method task-arithmetic --remove",
        "merge {post} {post} --method ties --against {inside}",
        "merge {post} {post} --method ties --data {data}",
        "merge {post} {post} --method fisher --curvature {data}",
        "merge {post} {post} --method gradient-matching --curvature x --base-curvature {data}",
        "sparsify {inside} --sparsity 0.5 --method magnitude",
        "sparsify {post} --sparsity 0.5 --calibrate {data}",
        "sparsify {post} --sparsity 0.5 --method magnitude --tuning oracle --tuning-data {data}",
        "sparsify {post} --sparsity 0.5 --method magnitude --heldout {data}",
    ],
)
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_force_never_removes_what_a_command_reads(
    base: Path, post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, dry: str
) -> None:
    inside, inner = base / "sparsity", base / "data.jsonl"  # where nothing else refuses the output
    shutil.copytree(post, inside)
    data.rename(inner)
    before = sorted(tmp_path.rglob("*"))
    words = command.format(post=post, inside=inside, data=inner).split()
    assert main([*words, "-o", str(base), "--force", *dry.split()]) == 2
    read = inside if "{inside}" in command else inner
    assert f"Writing {base} would remove {read}, which is read" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_measuring_replaces_curvature_files_only(
    post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "measure", str(post), str(data), "--examples", "1", "--force", "-o"]
    (tmp_path / "notes").write_text("mine", "utf-8")
    os.mkfifo(tmp_path / "pipe")
    for output, message in (
        (data, f"would remove {data}, which is read"),
        (post / "model.safetensors", "is no curvature file, so that --force does not replace it"),
        (tmp_path / "notes", "is no curvature file"),
        (post, f"would remove {post}, which is read"),
        (tmp_path / "pipe", "exists; give another file"),
    ):
        before = output.read_bytes() if output.is_file() else None
        assert main([*words, str(output)]) == 2
        assert message in capsys.readouterr().err
        assert before is None or output.read_bytes() == before
    fisher, link = post / "fisher.safetensors", tmp_path / "link"
    link.symlink_to(fisher)
    for output in (link, fisher, link):
        assert main([*words, str(output)]) == 0
    assert link.is_symlink() and fisher.is_file()
