"""One bit a weight: what the writer stores is what the reader gives back, and it is as small as it must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import rewrite, shard, weights_of
from tiny_models import make_delta, make_tokenizer
from transformers import AutoModelForCausalLM

from cmc_server.cli import main
from cmc_server.config import DeltaSource
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.packed import PACKED_FILE, is_packed, load_packed, unpack_folder, unpack_signs
from cmc_server.delta.runner import DeltaRunner, Feed
from cmc_server.delta.store import open_delta
from cmc_server.editing.packed import pack_signs
from cmc_server.errors import DeltaError

NORM = "model.norm.weight"


def regular(base: Path | str, post: Path, output: Path, *more: str) -> Path:
    assert main(["edit", str(base), str(post), "--method", "bitdelta", "-o", str(output), *more]) == 0
    return output


def pack(base: Path | str, post: Path, output: Path, *more: str) -> Path:
    return regular(base, post, output, "--packed", *more)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 31])
def test_signs_survive_any_length(length: int) -> None:
    delta = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(length))
    packed = pack_signs(delta)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-length // 8))
    assert torch.equal(unpack_signs(packed, length), torch.where(delta >= 0, 1.0, -1.0))


def test_the_lowest_bit_comes_first() -> None:
    assert pack_signs(torch.tensor([[1.0, -1, -1, 0, -1, -1, -1, -1, 1]])).tolist() == [[0b1001, 0b1]]


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_delta_runs_as_the_regular_one(tmp_path: Path, tied: bool) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    delta = make_delta(tmp_path / "delta", tokenizer)
    if tied:
        model = AutoModelForCausalLM.from_pretrained(delta)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(delta)
    folders = [pack("zero", delta, tmp_path / "packed"), regular("zero", delta, tmp_path / "regular")]
    ids = [1, 5, 9, 30, 2]
    runners = [
        DeltaRunner(open_delta(DeltaSource(name="d", path=str(folder))), max_seqs=1, device=torch.device("cpu"))
        for folder in folders
    ]
    packed, expected = (runner.forward([Feed(runner.new_sequence(), ids, 0)]) for runner in runners)
    assert torch.equal(packed, expected)


LEVELS = [
    ["--levels", "2"],
    ["--levels", "5", "--factor", "1.5", "--exclude", "lm_head*"],
    ["--levels", "256", "--granularity", "tensor"],
    ["--levels", "200"],  # more than a row has weights
]


@pytest.mark.parametrize(
    "more", [[], ["--granularity", "tensor"], ["--factor", "1.5", "--exclude", "lm_head*"], *LEVELS]
)
def test_without_a_base_packed_and_regular_are_the_same_bits(post: Path, tmp_path: Path, more: list[str]) -> None:
    packed = load_packed(pack("zero", post, tmp_path / "packed", *more))
    expected = weights_of(regular("zero", post, tmp_path / "regular", *more))
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in expected.items())
    open_delta(DeltaSource(name="packed", path=str(tmp_path / "packed")))
    assert torch.equal(packed[NORM], weights_of(post)[NORM])


@pytest.mark.parametrize("levels", ["1", "3"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_relative_to_a_base(base: Path, post: Path, tmp_path: Path, granularity: str, levels: str) -> None:
    base3, post2 = shard(base, tmp_path / "base3", 3), shard(post, tmp_path / "post2", 2)
    variant = ["--granularity", granularity, "--levels", levels]
    folder = pack(base3, post2, tmp_path / "packed", *variant)
    packed = load_packed(folder, base3)
    expected = weights_of(regular(base, post, tmp_path / "regular", *variant))
    assert packed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert packed[name].dtype == tensor.dtype
        torch.testing.assert_close(packed[name], tensor, rtol=2**-7, atol=1e-8)  # one unit of bfloat16


def test_the_base_must_be_the_one(base: Path, post: Path, tmp_path: Path) -> None:
    folder = pack(base, post, tmp_path / "packed")
    with pytest.raises(DeltaError, match="relative to a base; give the folder"):
        load_packed(folder)
    with pytest.raises(DeltaError, match=r"relative to another base: .*model.safetensors has other content"):
        load_packed(folder, post)
    with pytest.raises(DeltaError, match=r"with the file model.safetensors, which .* lacks"):
        load_packed(folder, tmp_path)


def test_it_is_at_most_an_eighth_of_float16(post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Rows of 32 weights are the worst case here: 4 bytes of signs and 2 of a scale stand for 64 bytes.
    output = tmp_path / "packed"
    words = ["edit", "zero", str(post), "--method", "bitdelta", "--packed", "--json"]
    assert main([*words, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main([*words, "-o", str(output)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert planned == {key: value for key, value in report.items() if key != "output"}
    elements = sum(tensor.numel() for tensor in weights_of(post).values())
    with safe_open(output / PACKED_FILE, framework="pt") as file:
        header = (output / PACKED_FILE).stat().st_size - sum(
            file.get_tensor(name).nbytes
            for name in file.keys()  # noqa: SIM118
        )
    assert report["packed"]["bytes"] == (output / PACKED_FILE).stat().st_size
    assert report["packed"]["share_of_float16"] == (output / PACKED_FILE).stat().st_size / (2 * elements)
    # The header and the norms do not shrink, which only shows in models as tiny as this one.
    assert (output / PACKED_FILE).stat().st_size - header <= 2 * elements / 8


def test_a_packed_delta_is_checked_like_any_other_and_becomes_a_regular_one(post: Path, tmp_path: Path) -> None:
    DeltaManifest(name="tiny", training={"seed": 3}).write(post)
    folder = pack("zero", post, tmp_path / "packed")
    artifact = open_delta(DeltaSource(name="tiny", path=str(folder)))
    assert is_packed(folder) and not is_packed(post)
    assert artifact.manifest.name == "tiny" and artifact.manifest.training["seed"] == 3
    (edit,) = artifact.manifest.training["edits"]
    assert edit["method"] == "bitdelta" and edit["base"] == "zero" and edit["options"]["granularity"] == "row"

    unpack_folder(folder, tmp_path / "unpacked")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    loaded = load_packed(folder)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(DeltaError, match="exists"):
        unpack_folder(folder, tmp_path / "unpacked")


def test_a_row_whose_scale_is_too_small_for_float16_keeps_its_size(post: Path, tmp_path: Path) -> None:
    rewrite(post, lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"] * 1e-6})
    packed = load_packed(pack("zero", post, tmp_path / "packed"))["lm_head.weight"]
    expected = weights_of(post)["lm_head.weight"].float().abs().mean(-1)
    torch.testing.assert_close(packed.float().abs().mean(-1), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("spoil", ["cut", "format", "tensor", "outside", "level"])
def test_corrupt_files(post: Path, tmp_path: Path, spoil: str) -> None:
    path = pack("zero", post, tmp_path / "packed", "--levels", "3") / PACKED_FILE
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if spoil == "tensor":
            weights.pop("lm_head.weight.scales")
        if spoil == "level":  # a fourth one, which there is no scale for
            weights["lm_head.weight.levels"] |= 255
        changes = {"format": {"format": "other"}, "outside": {"base": json.dumps({"../post/x": "0"})}}
        save_file(weights, path, metadata=metadata | changes.get(spoil, {}))
    with pytest.raises(DeltaError, match=r"packed.safetensors (is not|names the base file)"):
        load_packed(path.parent, post)


def test_types_that_could_not_be_unpacked(post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(post, lambda weights: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()})
    words = ["edit", "zero", str(post), "--method", "bitdelta", "--packed", "-o", str(tmp_path / "packed")]
    assert main(words) == 2
    assert "is float8_e4m3fn, which cannot be packed; leave out --packed" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_packed_weights_are_not_edited_as_they_are(
    post: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", "zero", str(post), "--method", "bitdelta", "--packed", "-o", str(tmp_path / "packed")]
    assert main(words) == 0
    assert main(["edit", "zero", str(tmp_path / "packed"), "--method", "expo", "--dry-run"]) == 2
    assert "holds packed weights, which cannot be edited as they are" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--levels", "257"], ["--magnitudes", "uniform"]])
def test_what_does_not_fit_into_few_bits(post: Path, tmp_path: Path, more: list[str]) -> None:
    words = ["edit", "zero", str(post), "--method", "bitdelta", "--packed", "-o", str(tmp_path / "packed")]
    assert main([*words, *more]) == 2
    assert not (tmp_path / "packed").exists()
