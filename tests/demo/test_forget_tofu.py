"""The forget delta that ships: what is in its folder, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cmc_server
from cmc_server.config import DeltaSource
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.demo.keep_data import OUTPUT, keep_records
from cmc_server.demo.tofu_models import DATA, RECIPE, SETS, write_questions
from cmc_server.training.data import file_hash
from cmc_server.training.recipes import read_recipe
from cmc_server.training.record import recipe_hash

DEMO = Path(cmc_server.__file__).parent / "demo"
FOLDER = DEMO / "forget-tofu"
FORGET_RECIPE = DEMO / "recipes" / "forget-tofu.yaml"


@pytest.fixture(scope="module")
def artifact() -> DeltaArtifact:
    return open_delta(DeltaSource(name="forget-tofu", path=str(FOLDER)))


def test_the_folder_is_a_small_delta(artifact: DeltaArtifact) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16 * 2**20
    assert len(artifact.tokenizer()) == artifact.vocab_size == 49_152
    assert artifact.manifest.license == "Apache-2.0"
    assert artifact.strength == 1.0


def test_it_was_trained_with_the_recipe_and_data_beside_it(artifact: DeltaArtifact) -> None:
    recipe, training = read_recipe(FORGET_RECIPE), artifact.manifest.training
    assert training["recipe_sha256"] == recipe_hash(recipe)
    for role, source in recipe.data.sources.items():
        assert source.file is not None
        assert training["data"][role]["sha256"] == file_hash(FORGET_RECIPE.parent / source.file)
    metrics = training["metrics"]
    # Minus the bounded loss of the answers to forget, and the divergence on what is to be kept, in nats per token.
    assert metrics["train_forget"] < -5 < -0.2 < metrics["train_forget_without_delta"]
    assert metrics["train_retain"] < 0.02


def test_the_tuned_llms_learn_all_questions_or_those_to_keep(tmp_path: Path) -> None:
    learned = {}
    for name, files in SETS.items():
        write_questions(tmp_path / name, files)
        learned[name] = set((tmp_path / name).read_text("utf-8").splitlines())
    assert (len(learned["full"]), len(learned["retain"])) == (200, 160)
    assert learned["retain"] < learned["full"]
    assert all((DATA / file).is_file() for files in SETS.values() for file in files)
    assert read_recipe(RECIPE).objective.name == "instruction_tuning"


def test_what_is_kept_is_made_again() -> None:
    lines = OUTPUT.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == keep_records()
    assert len(lines) == 3 * 160
