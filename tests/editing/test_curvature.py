"""Fisher and Gram matrices against values known otherwise, and the files that keep them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import rewrite
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cmc_server.cli import main
from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.curvature import CurvatureFile, CurvatureOrigin, write_curvature
from cmc_server.editing.fisher import diagonal_fisher
from cmc_server.editing.gram import gram_matrices
from cmc_server.editing.texts import Example, read_texts
from cmc_server.errors import EditingError


class Softmax(nn.Module):
    """The smallest language model: a row of logits for each previous token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[ids])


def test_fisher_of_a_softmax_is_known() -> None:
    table = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    # Token 0 is read once and token 1 twice where labels count; token 2 is only ever a label.
    example = Example(torch.tensor([[2, 0, 1, 1, 2]]), first_label=2)
    measured = diagonal_fisher(Softmax(table), [example] * 20_000, seed=0)["table"]  # type: ignore[arg-type]
    p = table.softmax(-1)
    # The gradient of log p_y is onehot(y) - p, of variance p (1 - p) in each entry.
    expected = torch.tensor([[1.0], [2.0], [0.0]]) * p * (1 - p)
    torch.testing.assert_close(measured, expected, rtol=0.08, atol=1e-4)


def tiny(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def examples() -> list[Example]:
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    return [Example(row[None], first) for row, first in zip(ids, (1, 2, 3, 5), strict=True)]


def test_fisher_is_the_mean_of_squared_gradients_of_each_example() -> None:
    """torch.func, all examples at once, labels drawn as documented: one multinomial for each example in turn."""
    model, data = tiny(), examples()
    draws = torch.Generator().manual_seed(5)
    masks, labels = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.int64)
    for row, example in enumerate(data):
        positions = slice(example.first_label - 1, 5)
        probabilities = model(example.ids).logits[0, positions].softmax(-1)
        labels[row, positions] = torch.multinomial(probabilities, 1, generator=draws)[:, 0]
        masks[row, positions] = True

    def likelihood(weights: dict[str, Tensor], ids: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        output = functional_call(model, weights, (ids[None],), {"use_cache": False})
        log_p = output.logits[0, :-1].log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        return torch.where(mask, log_p, 0.0).sum()

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    each = vmap(grad(likelihood), (None, 0, 0, 0))(weights, torch.cat([e.ids for e in data]), labels, masks)
    measured = diagonal_fisher(model, data, seed=5)
    for name, gradients in each.items():
        torch.testing.assert_close(measured[name], gradients.square().mean(0), rtol=1e-4, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_weight_has_one_curvature_under_each_name() -> None:
    measured = diagonal_fisher(tiny(tied=True), examples(), seed=0)
    assert torch.equal(measured["lm_head.weight"], measured["model.embed_tokens.weight"])
    assert "lm_head.weight" not in gram_matrices(tiny(tied=True), examples())


def test_gram_matrices_are_those_of_the_inputs() -> None:
    model, data = tiny(), examples()
    grams = gram_matrices(model, data)
    assert {name for name in grams if "layers" not in name} == {"lm_head.weight"} and len(grams) == 8
    hidden = [model(e.ids, output_hidden_states=True).hidden_states[-1][0] for e in data]
    expected = sum(states.T @ states for states in hidden) / 4
    torch.testing.assert_close(grams["lm_head.weight"], expected)
    query = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(grams[query], grams[query.replace("q_proj", "k_proj")])
    assert not model.lm_head._forward_pre_hooks


def test_measure_writes_a_file_that_belongs_to_the_weights(
    post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "some" / "fisher.safetensors"
    words = ["merge", "measure", str(post), str(data), "-o", str(output)]
    assert main([*words, "--examples", "2", "--dataset-size", "500", "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (report["num_examples"], report["dataset_size"], report["tensors"]) == (2, 500, 21)
    assert "fisher: 100%" in shown.err
    file, checkpoint = CurvatureFile(output), Checkpoint(post)
    file.check(checkpoint, "fisher")
    stored = load_file(output)
    name = "model.norm.weight"
    torch.testing.assert_close(file.read(name, 3, 5), 500 * stored[name][3:5])
    assert all(tensor.dtype == torch.float32 and bool(tensor.any()) for tensor in stored.values())
    assert main(words) == 2
    assert "exists; give another file, or --force" in capsys.readouterr().err
    assert main([*words, "--examples", "2", "--force"]) == 0
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_file(output).items())
    assert main([*words, "--examples", "2", "--seed", "1", "--force"]) == 0
    assert not torch.equal(load_file(output)[name], stored[name])
    rewrite(post, lambda weights: weights | {name: 2 * weights[name]})
    with pytest.raises(EditingError, match="was not measured on the weights"):
        file.check(Checkpoint(post), "fisher")


def test_bad_measurements(post: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *more: str, text: Path = data) -> None:
        assert main(["merge", "measure", str(post), str(text), "-o", str(tmp_path / "f"), *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "f").exists()

    refused("choose fisher or gram", "--kind", "hessian")
    refused("--examples must be at least 1", "--examples", "0")
    refused("--dataset-size must be at least 1", "--dataset-size", "0")
    refused("The data file missing cannot be read", text=Path("missing"))
    (tmp_path / "broken.jsonl").write_text('{"text": 3}\n', "utf-8")
    refused("line 1: expected", text=tmp_path / "broken.jsonl")
    (tmp_path / "marked.jsonl").write_text('{"text": "The fox."}\n', "utf-8-sig")
    assert len(read_texts(tmp_path / "marked.jsonl")) == 1
    rewrite(post, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] * torch.inf})
    refused("The gram of lm_head.weight is not finite", "--kind", "gram")
    refused("predicts numbers that are not finite")
    assert main(["merge", "measure", str(tmp_path / "nothing"), str(data), "-o", str(tmp_path / "f")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    origin = CurvatureOrigin("fisher", "by hand", 1, 1, {})
    with pytest.raises(EditingError, match="cannot be written"):
        write_curvature(tmp_path / "file" / "f.safetensors", {"w": torch.ones(2)}, origin)


def test_measured_weights_are_what_transformers_loads(post: Path, data: Path, tmp_path: Path) -> None:
    """The file's names are the checkpoint's, and a rare token's embedding has no curvature."""
    assert main(["merge", "measure", str(post), str(data), "-o", str(tmp_path / "f")]) == 0
    fisher = load_file(tmp_path / "f")
    assert set(fisher) == set(AutoModelForCausalLM.from_pretrained(post).state_dict())
    spare = AutoTokenizer.from_pretrained(post).convert_tokens_to_ids("<spare>")
    assert not bool(fisher["model.embed_tokens.weight"][spare].any())
