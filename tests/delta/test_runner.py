"""The batched runner with its paged cache equals a plain forward pass over each whole input."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make_delta
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from cmc_server.config import DeltaSource
from cmc_server.delta.capacity import memory_needed
from cmc_server.delta.runner import MAX_TOKENS, DeltaRunner, Feed, load_model
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.errors import CapacityError, DeltaError

CPU = torch.device("cpu")
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 256}
ROPE = {"rope_theta": 1e4, "factor": 4.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
FAST: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama, biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, linear angles": LlamaConfig(**SMALL, rope_parameters=ROPE | {"rope_type": "linear"}),
    "llama, llama 3's angles": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
}
CONFIGS: dict[str, PreTrainedConfig] = {
    **FAST,
    "llama, angles that depend on the length": LlamaConfig(**SMALL, rope_parameters=ROPE | {"rope_type": "dynamic"}),
    "llama, another activation": LlamaConfig(**SMALL, hidden_act="gelu"),
    "mistral, sliding window": MistralConfig(**SMALL, sliding_window=6),
    "qwen3, query-key norms": Qwen3Config(**SMALL),
    "gemma3, mixed windows": Gemma3TextConfig(
        **SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "gpt2, learned positions": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256),
}


def random_model(folder: Path, config: PreTrainedConfig) -> DeltaArtifact:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return open_delta(DeltaSource(name="d", path=str(folder)))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tokenizers_by_family: dict[str, object]) -> DeltaArtifact:
    folder = tmp_path_factory.mktemp("delta")
    tokenizers_by_family["byte_level_bpe"].save_pretrained(folder)  # type: ignore[attr-defined]
    return open_delta(DeltaSource(name="d", path=str(make_delta(folder / "model", folder))))


def expected(artifact: DeltaArtifact, inputs: list[list[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = load_model(artifact, dtype, "eager")
    with torch.inference_mode():
        return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1].float() for ids in inputs])


def grow_and_roll_back(runner: DeltaRunner, artifact: DeltaArtifact, steps: int, tolerance: float) -> None:
    draw = random.Random(0)
    sequences = [runner.new_sequence() for _ in range(4)]
    inputs = [[draw.randrange(90) for _ in range(length)] for length in (1, 7, 30, 90)]
    keeps = [0] * 4
    for _ in range(steps):
        rows = draw.sample(range(4), draw.randint(1, 4))
        logits = runner.forward([Feed(sequences[row], inputs[row], keeps[row]) for row in rows])
        torch.testing.assert_close(
            logits, expected(artifact, [inputs[row] for row in rows], runner.dtype), atol=tolerance, rtol=tolerance
        )
        for row in rows:
            keeps[row] = draw.randint(0, len(inputs[row])) if draw.random() < 0.3 else len(inputs[row])
            grown = [draw.randrange(90) for _ in range(draw.randint(0, 9))]
            inputs[row] = (inputs[row][: keeps[row]] + grown)[: runner.context_length] or [5]
            keeps[row] = min(keeps[row], len(inputs[row]))


def test_rows_of_unequal_length_grow_and_roll_back(artifact: DeltaArtifact) -> None:
    grow_and_roll_back(DeltaRunner(artifact, max_seqs=4, device=CPU), artifact, steps=25, tolerance=1e-4)


def test_bfloat16(artifact: DeltaArtifact) -> None:
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU, dtype=torch.bfloat16)
    grow_and_roll_back(runner, artifact, steps=8, tolerance=0.35)


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name: str, tmp_path: Path) -> None:
    artifact = random_model(tmp_path, CONFIGS[name])
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU)
    assert (runner._fast is not None) == (name in FAST)
    grow_and_roll_back(runner, artifact, steps=10, tolerance=1e-4)


def test_a_long_prompt_is_read_in_pieces(artifact: DeltaArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmc_server.delta.runner.MAX_TOKENS", 16)
    assert MAX_TOKENS > 16
    grow_and_roll_back(DeltaRunner(artifact, max_seqs=4, device=CPU), artifact, steps=8, tolerance=1e-4)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are recorded as they are on a GPU, but for the graph: to replay a step is to call it again."""
    replayed: list[int] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()
        step()

        def replay() -> None:
            replayed.append(1)
            step()

        return replay

    monkeypatch.setattr("cmc_server.delta.runner.recorder_for", lambda device: record)
    return replayed


def test_recorded_steps(artifact: DeltaArtifact, recorded: list[int]) -> None:
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU)
    assert recorded == [1], "the runner's own check ends with a step that is recorded"
    grow_and_roll_back(runner, artifact, steps=30, tolerance=1e-4)
    sequences = [runner.new_sequence() for _ in range(3)]
    inputs = [[(5 * row + position) % 90 for position in range(start)] for row, start in enumerate((3, 33, 95))]
    runner.forward([Feed(sequence, ids, 0) for sequence, ids in zip(sequences, inputs, strict=True)])
    recorded.clear()
    for step in range(40):
        for ids in inputs:
            ids.append((7 * step + len(ids)) % 90)
        rows = [0, 1, 2] if step % 3 else [2, 0]
        feeds = [Feed(sequences[row], inputs[row], sequences[row].length) for row in rows]
        torch.testing.assert_close(
            runner.forward(feeds), expected(artifact, [inputs[row] for row in rows]), atol=1e-4, rtol=1e-4
        )
    assert 20 < len(recorded) < 40


def test_steps_too_large_to_be_recorded(
    artifact: DeltaArtifact, recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = DeltaRunner(artifact, max_seqs=1, device=CPU)._pool.cached[0, 0].nbytes
    monkeypatch.setattr("cmc_server.delta.graphs._MOST_BYTES", 3 * block_bytes)
    monkeypatch.setattr("cmc_server.delta.graphs._MOST_ROWS", 3)
    recorded.clear()
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU)
    grow_and_roll_back(runner, artifact, steps=20, tolerance=1e-4)
    sequences = [runner.new_sequence() for _ in range(4)]
    recorded.clear()
    for num_rows, length, is_recorded in ((1, 20, True), (3, 20, True), (4, 20, False), (1, 70, False), (2, 33, False)):
        feeds = [Feed(sequences[row], [7 + row] * length, 0) for row in range(num_rows)]
        runner.forward(feeds)
        longer = [Feed(sequences[row], [7 + row] * (length + 1), length) for row in range(num_rows)]
        logits = runner.forward(longer)
        torch.testing.assert_close(logits, expected(artifact, [feed.ids for feed in longer]), atol=1e-4, rtol=1e-4)  # type: ignore[misc]
        assert bool(recorded) == is_recorded
        recorded.clear()


def test_a_step_that_cannot_be_recorded(
    artifact: DeltaArtifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("cmc_server.delta.runner.recorder_for", lambda device: record)
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU)
    assert "runs without CUDA graphs: operation not permitted" in caplog.text
    grow_and_roll_back(runner, artifact, steps=5, tolerance=1e-4)


@pytest.mark.parametrize("blocks", [1, 3])
def test_rows_are_attended_to_in_groups_that_fit_the_cache(
    artifact: DeltaArtifact, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    block_bytes = DeltaRunner(artifact, max_seqs=1, device=CPU)._pool.cached[0, 0].nbytes
    monkeypatch.setattr("cmc_server.delta.runner._GATHERED_BYTES", blocks * block_bytes)
    grow_and_roll_back(DeltaRunner(artifact, max_seqs=4, device=CPU), artifact, steps=25, tolerance=1e-4)


def test_the_same_input_again_gives_the_same_row(artifact: DeltaArtifact) -> None:
    runner = DeltaRunner(artifact, max_seqs=1, device=CPU)
    sequence = runner.new_sequence()
    first = runner.forward([Feed(sequence, [1, 2, 3], 0)])
    torch.testing.assert_close(runner.forward([Feed(sequence, [1, 2, 3], 3)]), first, atol=1e-5, rtol=1e-5)


def test_an_equal_beginning_is_computed_once(artifact: DeltaArtifact) -> None:
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU)
    draw = random.Random(0)
    prompt = [draw.randrange(90) for _ in range(100)]
    inputs = [[*prompt, 7], [*prompt, 8, 9], [*prompt[:50], 3], [*prompt, 7]]
    sequences = [runner.new_sequence() for _ in inputs]
    before = runner.num_tokens
    logits = runner.forward([Feed(*pair, 0, settled=100) for pair in zip(sequences[:3], inputs[:3], strict=True)])
    torch.testing.assert_close(logits, expected(artifact, inputs[:3]), atol=1e-4, rtol=1e-4)
    # All of the first row, and of the others what lies behind whole blocks of 32.
    assert runner.num_tokens - before == 101 + (102 - 96) + (51 - 32)
    for sequence in sequences[:3]:
        sequence.free()
    logits = runner.forward([Feed(sequences[3], inputs[3], 0, settled=100)])
    torch.testing.assert_close(logits, expected(artifact, inputs[3:]), atol=1e-4, rtol=1e-4)
    assert runner.num_tokens - before == 101 + 6 + 19 + 5  # kept after its rows were gone


def test_a_full_cache_is_said_and_survived(artifact: DeltaArtifact) -> None:
    runner = DeltaRunner(artifact, max_seqs=1, device=CPU)
    first, second = runner.new_sequence(), runner.new_sequence()
    ids = [1] * runner.context_length
    runner.forward([Feed(first, ids, 0)])
    with pytest.raises(CapacityError, match="--delta-memory"):
        runner.forward([Feed(second, ids, 0)])
    first.free()
    runner.forward([Feed(second, ids, 0)])


def test_memory_is_known_before_loading(artifact: DeltaArtifact) -> None:
    runner = DeltaRunner(artifact, max_seqs=3, device=CPU)
    assert memory_needed(artifact, 3, value_bytes=4, on_cpu=True) == pytest.approx(runner.memory_bytes, rel=0.01)


@pytest.mark.parametrize("graphs", [False, True])
def test_last_ids_that_only_the_device_knows(
    artifact: DeltaArtifact, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and single tokens in one step, twins among them, and steps of single tokens alone."""
    if graphs:  # without a GPU a recorded step is the step itself
        monkeypatch.setattr("cmc_server.delta.runner.recorder_for", lambda _: lambda step: step)
    runner = DeltaRunner(artifact, max_seqs=4, device=CPU)
    sequences = [runner.new_sequence() for _ in range(4)]
    inputs = [list(range(20, 60)), list(range(20, 60)), [7], [3, 4, 5]]
    for grown in range(3):
        if grown:
            inputs = [[*ids, 30 + row] for row, ids in enumerate(inputs)]
        hidden = [row != 2 for row in range(4)]
        feeds = [
            Feed(sequences[row], [*ids[:-1], -1] if hidden[row] else ids, len(ids) - 1 if grown else 0, settled=40)
            for row, ids in enumerate(inputs)
        ]
        newest = torch.tensor([ids[-1] if hidden[row] else -1 for row, ids in enumerate(inputs)])
        logits = runner.forward(feeds, newest)
        torch.testing.assert_close(logits, expected(artifact, inputs), atol=1e-4, rtol=1e-4)


def test_attention_that_is_not_standard_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)
    artifact = random_model(tmp_path, config)
    with pytest.raises(DeltaError, match="no standard attention"):
        DeltaRunner(artifact, max_seqs=1, device=CPU)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    random_model(tmp_path, CONFIGS["qwen3, query-key norms"])
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaError, match="up_proj"):
        DeltaRunner(open_delta(DeltaSource(name="d", path=str(tmp_path))), max_seqs=1, device=CPU)


@pytest.mark.parametrize(("name", "is_refused"), [("self_attn.q_proj.bias", True), ("rotary_emb.inv_freq", False)])
def test_a_weight_too_many_is_named(tmp_path: Path, name: str, is_refused: bool) -> None:
    from safetensors.torch import load_file, save_file

    random_model(tmp_path, CONFIGS["qwen3, query-key norms"])
    weights = load_file(tmp_path / "model.safetensors") | {f"model.layers.0.{name}": torch.ones(8)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_delta(DeltaSource(name="d", path=str(tmp_path)))
    if is_refused:
        with pytest.raises(
            DeltaError, match=r"has the weight .*q_proj.bias, which the model of its config.json has not"
        ):
            DeltaRunner(source, max_seqs=1, device=CPU)
    else:
        DeltaRunner(source, max_seqs=1, device=CPU)


def test_what_a_block_held_before_does_not_matter(artifact: DeltaArtifact) -> None:
    runner = DeltaRunner(artifact, max_seqs=3, device=CPU)
    runner._pool.cached.fill_(float("nan"))
    inputs = [[1, 2, 3], list(range(40)), [5]]
    logits = runner.forward([Feed(runner.new_sequence(), ids, 0) for ids in inputs])
    torch.testing.assert_close(logits, expected(artifact, inputs), atol=1e-4, rtol=1e-4)
