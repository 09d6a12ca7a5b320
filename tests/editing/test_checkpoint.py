"""Checkpoints on disk: what agrees, and what is refused and by which name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import Weights, rewrite, shard, weights_of
from torch import Tensor

from cmc_server.editing.checkpoint import Checkpoint, check_agreement
from cmc_server.editing.methods import Method, build_method
from cmc_server.editing.shards import Shard
from cmc_server.editing.sources import Sources
from cmc_server.editing.stream import Edit, write_edited
from cmc_server.errors import EditingError

EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def edited(edit: Edit) -> Weights:
    post = edit.sources.post
    return {name: torch.cat(list(edit.tensor(name))).view(post.stored(name).shape) for name in post.names}


def test_pieces_of_a_tensor_are_the_tensor(post: Path) -> None:
    file, weights = Shard(post / "model.safetensors"), weights_of(post)
    assert set(file.tensors) == set(weights)
    for name, tensor in weights.items():
        assert file.tensors[name].shape == tuple(tensor.shape) and file.tensors[name].dtype == tensor.dtype
        flat = tensor.flatten()
        assert torch.equal(file.read(name), flat) and torch.equal(file.read(name, 3, 11), flat[3:11])


@pytest.mark.parametrize("cached", [True, False])
def test_forgotten_tensors_can_be_read_again(post: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setattr("cmc_server.editing.shards._is_cached", lambda file: cached)
    whole = Checkpoint(post)
    for name in whole.names:
        before = whole.read(name)
        whole.forget(name)
        assert torch.equal(whole.read(name), before)


def test_every_type_and_odd_shapes_survive(tmp_path: Path) -> None:
    weights = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(5),
        "half": torch.ones(3, dtype=torch.float16),
        "eighth": torch.ones(3).to(torch.float8_e4m3fn),
        "double": torch.ones(2, 2, dtype=torch.float64),
    }
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}", "utf-8")
    save_file(weights, source / "model.safetensors")
    checkpoint = Checkpoint(source)
    sources = Sources(None, (checkpoint,), exclude=("double",))
    write_edited(Edit(sources, build_method("expo", {"alpha": 1.0}), 0), target, lambda _: None)
    written = weights_of(target)
    for name, tensor in weights.items():
        factor = 2 if tensor.dtype.is_floating_point and name != "double" else 1
        assert torch.equal(written[name].double(), factor * tensor.double()) and written[name].dtype == tensor.dtype


@pytest.mark.parametrize("method", ["dare", "magnitude", "bitdelta", "twin", "ties", "expo"])
def test_shards_make_no_difference(base: Path, post: Path, tmp_path: Path, method: str) -> None:
    whole = edited(Edit(Sources(Checkpoint(base), (Checkpoint(post),)), build_method(method, {}), 5))
    pieces = Sources(Checkpoint(shard(base, tmp_path / "base3", 3)), (Checkpoint(shard(post, tmp_path / "post2", 2)),))
    split = edited(Edit(pieces, build_method(method, {}), 5))
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    target = tmp_path / "written"
    target.mkdir()
    write_edited(Edit(pieces, build_method(method, {}), 5), target, lambda _: None)
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights_of(target).items())
    assert [path.name for path in sorted(target.iterdir())] == [
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(base: Path, post: Path) -> None:
    sources = Sources(Checkpoint(base), (Checkpoint(post),))
    runs = [edited(Edit(sources, build_method("dare", {}), seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0][EMBEDDINGS], runs[2][EMBEDDINGS])


@pytest.mark.parametrize(
    ("method", "values"), [("dare", {"drop": 0.0}), ("dare", {"k": 1.0}), ("expo", {"alpha": 0}), ("ties", {"drop": 0})]
)
def test_an_edit_that_changes_nothing_gives_the_same_bits(
    base: Path, post: Path, method: str, values: dict[str, float]
) -> None:
    result = edited(Edit(Sources(Checkpoint(base), (Checkpoint(post),)), build_method(method, values), 0))
    assert all(torch.equal(tensor, result[name]) for name, tensor in weights_of(post).items())


def test_dropped_delta_parameters_give_the_base_back(base: Path, post: Path) -> None:
    result = edited(Edit(Sources(Checkpoint(base), (Checkpoint(post),)), build_method("magnitude", {"drop": 0.5}), 0))
    for name, tensor in result.items():
        before, after = weights_of(base)[name], weights_of(post)[name]
        assert bool(((tensor == before) | (tensor == after)).all()) and not torch.equal(tensor, after)


def test_arithmetic_is_float32_and_the_type_is_that_of_the_trained_model(made: Path, post: Path) -> None:
    mixed = Sources(Checkpoint(made / "float"), (Checkpoint(post),))
    result = edited(Edit(mixed, build_method("expo", {"alpha": 0.5}), 0))
    first, second = weights_of(made / "float"), weights_of(post)
    for name, tensor in result.items():
        exact = first[name].double() + 1.5 * (second[name].double() - first[name].double())
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, exact.bfloat16(), rtol=2**-7, atol=1e-7)


def test_patterns_choose_tensors(base: Path, post: Path) -> None:
    sources = Sources(Checkpoint(base), (Checkpoint(post),), only=("model.layers.*",), exclude=("*.mlp.*",))
    result, before = edited(Edit(sources, build_method("expo", {}), 0)), weights_of(post)
    changed = {name for name in result if not torch.equal(result[name], before[name])}
    assert changed == {name for name in before if "layers" in name and "mlp" not in name}
    with pytest.raises(EditingError, match=r"fits the pattern 'model.layer.\*'"):
        Sources(Checkpoint(base), (Checkpoint(post),), only=("model.layer.*",))


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: change(weights[name]).contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), f"post lacks tensors of .*base: {NORM}"),
        (lambda weights: weights | {"extra": torch.ones(1)}, "base lacks tensors of .*post: extra"),
        (with_tensor(NORM, lambda tensor: tensor[:-1]), rf"differ in shape: {NORM} \[32\] and \[31\]"),
        (with_tensor(NORM, lambda tensor: tensor.int()), f"integers in one and numbers in the other: {NORM}"),
        (without("lm_head.weight"), "lacks tensors of .*: lm_head.weight"),
    ],
)
def test_checkpoints_that_differ(base: Path, post: Path, change: Callable[[Weights], Weights], message: str) -> None:
    rewrite(post, change)
    with pytest.raises(EditingError, match=message):
        check_agreement(Checkpoint(base), Checkpoint(post))


def test_tied_and_untied_weights(base: Path, post: Path) -> None:
    config = json.loads((post / "config.json").read_text("utf-8"))
    (post / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), "utf-8")
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), "utf-8")
    with pytest.raises(EditingError, match=r"post ties its output head .* \(tied weights\), .*base not"):
        check_agreement(Checkpoint(base), Checkpoint(post))


def test_a_head_that_is_stored_though_it_is_tied(post: Path) -> None:
    config = json.loads((post / "config.json").read_text("utf-8"))
    (post / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), "utf-8")
    with pytest.raises(EditingError, match=r"post stores lm_head.weight though its config ties .* save it again"):
        Sources(None, (Checkpoint(post),))


def test_doubles_are_not_rounded(base: Path, post: Path) -> None:
    rewrite(post, lambda weights: {name: tensor.double() for name, tensor in weights.items()})
    with pytest.raises(EditingError, match=r"post stores .* as float64, which arithmetic in float32 would round"):
        Edit(Sources(Checkpoint(base), (Checkpoint(post),)), build_method("expo", {}), 0)


def test_other_vocabularies_of_the_same_size(base: Path, post: Path) -> None:
    path = post / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("<spare>", "<other>"), "utf-8")
    with pytest.raises(EditingError, match=r"vocabularies of .* differ in \"<other>\", \"<spare>\""):
        check_agreement(Checkpoint(base), Checkpoint(post))
    path.unlink()
    check_agreement(Checkpoint(base), Checkpoint(post))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["base", "post"])
@pytest.mark.parametrize("name", [EMBEDDINGS, NORM])
def test_what_is_not_finite_is_named(base: Path, post: Path, which: str, name: str, value: float) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = value
        return tensor

    rewrite({"base": base, "post": post}[which], with_tensor(name, spoil))
    sources = Sources(Checkpoint(base), (Checkpoint(post),), exclude=(NORM,) if which == "post" else ())
    with pytest.raises(EditingError, match=f"{name} of .*{which} holds NaN or infinity"):
        edited(Edit(sources, build_method("expo", {}), 0))


def test_large_but_finite_weights_are_no_infinity(base: Path, post: Path) -> None:
    for folder in (base, post):
        rewrite(folder, with_tensor(NORM, lambda tensor: torch.full_like(tensor, 3e38)))
    edited(Edit(Sources(Checkpoint(base), (Checkpoint(post),)), build_method("expo", {}), 0))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(6e4, torch.float16), (3e38, torch.bfloat16), (3e38, torch.float32), (400.0, torch.float8_e4m3fn)],
)
def test_a_result_beyond_its_type_is_named(base: Path, post: Path, value: float, dtype: torch.dtype) -> None:
    rewrite(post, with_tensor(NORM, lambda tensor: torch.full_like(tensor, value).to(dtype)))
    with pytest.raises(EditingError, match=rf"edited {NORM} does not fit its type {dtype}"):
        edited(Edit(Sources(Checkpoint(base), (Checkpoint(post),)), build_method("expo", {"alpha": 0.5}), 0))


class Undone(Method):
    """Leaves nothing of what training changed."""

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(deltas[0])


def test_a_difference_that_overflows_is_found_whatever_becomes_of_it(base: Path, post: Path) -> None:
    for folder, value in ((base, -3e38), (post, 3e38)):
        rewrite(folder, with_tensor(NORM, lambda tensor, v=value: torch.full_like(tensor, v)))
    with pytest.raises(EditingError, match=f"edited {NORM} does not fit"):
        edited(Edit(Sources(Checkpoint(base), (Checkpoint(post),)), Undone(), 0))


def test_broken_folders(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditingError, match="There is no folder"):
        Checkpoint(tmp_path / "missing")
    sharded = shard(base, tmp_path / "sharded")
    part = sharded / "model-00002-of-00003.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-10])
    with pytest.raises(EditingError, match=r"00002-of-00003.safetensors is not a valid safetensors file"):
        Checkpoint(sharded)
    part.unlink()
    with pytest.raises(EditingError, match=r"has no model-00002-of-00003.safetensors"):
        Checkpoint(sharded)
    part.write_bytes(content)
    index = json.loads((sharded / "model.safetensors.index.json").read_text("utf-8"))
    del index["weight_map"][NORM]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(EditingError, match=f"does not fit the shards: see {NORM}"):
        Checkpoint(sharded)
    index["weight_map"][NORM] = "../model.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(EditingError, match="must name files of the folder"):
        Checkpoint(sharded)
    (sharded / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    index["weight_map"][NORM] = part.name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(EditingError, match=r"has both model.safetensors and model.safetensors.index.json"):
        Checkpoint(sharded)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(EditingError, match=r"has no model.safetensors"):
        Checkpoint(base)
    (base / "config.json").write_text("[]", "utf-8")
    with pytest.raises(EditingError, match="must hold a JSON object"):
        Checkpoint(base)


def test_the_fingerprint_follows_the_content(base: Path, post: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    prints = [Checkpoint(folder).fingerprint() for folder in (base, copy, post)]
    assert prints[0] == prints[1] != prints[2]
