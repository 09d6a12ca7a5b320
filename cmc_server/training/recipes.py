"""``RECIPE.yaml``: everything that decides what a trained delta becomes. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cmc_server.config import first_problem, is_delta_name
from cmc_server.errors import ConfigError
from cmc_server.training.objectives import OBJECTIVES


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DeltaSize(_Strict):
    """Shape of a delta that starts from random weights: a Llama with tied embeddings.

    Args:
        hidden_size: width of the model.
        num_layers: number of decoder layers.
        num_heads: attention heads; must divide ``hidden_size`` into even parts.
        intermediate_size: width of the feed-forward part.
        initializer_range: standard deviation of the random weights.
    """

    hidden_size: int = Field(default=96, ge=2)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=3, ge=1)
    intermediate_size: int = Field(default=256, ge=1)
    initializer_range: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> DeltaSize:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_heads")
        return self


class ObjectiveSettings(_Strict):
    """What is minimised. A recipe may give the name alone.

    Args:
        name: a key of :data:`cmc_server.training.objectives.OBJECTIVES`.
        template_weight: pull towards the template LLM's own distribution, see
            :func:`~cmc_server.training.objectives.instruction_tuning`.
    """

    name: str = "instruction_tuning"
    template_weight: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in OBJECTIVES:
            raise ValueError(f"there is no objective {name!r}; there are {', '.join(OBJECTIVES)}")
        return name


class TrainingData(_Strict):
    """Files of chats, one ``{"messages": [...]}`` a line; the last message is the answer to learn.

    Args:
        train: the file to train on, relative to the recipe.
        heldout: a file whose loss is measured after every epoch, relative to the recipe.
        max_length: longest input in tokens; longer chats are left out, with a warning.
    """

    train: str
    heldout: str | None = None
    max_length: int = Field(default=1024, ge=8)


class Optimisation(_Strict):
    """AdamW with linear warm-up and cosine decay, in float32.

    Args:
        epochs: passes over the data.
        batch_size: chats per step.
        learning_rate: the highest one.
        weight_decay: decoupled, on matrices only.
        warmup_share: part of the steps in which the learning rate rises.
        max_grad_norm: gradients are clipped to this norm.
    """

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Output(_Strict):
    """The delta folder that training writes.

    Args:
        folder: where, relative to the recipe; ``--output`` wins.
        dtype: type of the stored weights. float16 keeps three more bits of them than bfloat16.
        default_strength: see :class:`~cmc_server.delta.manifest.DeltaManifest`.
        advised_range: likewise.
    """

    folder: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    default_strength: float = 1.0
    advised_range: tuple[float, float] | None = None


class Recipe(_Strict):
    """One training run.

    Args:
        name: the delta's name.
        description: one sentence for people.
        license: of the delta, as an SPDX identifier.
        template: the frozen template LLM, a hub id or a folder; ``--template`` wins.
        delta: shape of the delta.
        data: what to learn.
        objective: how.
        optimisation: how fast and how long.
        seed: of the weights and of the order of the data.
        output: what is written.
    """

    name: str
    description: str = ""
    license: str | None = None
    template: str
    delta: DeltaSize = DeltaSize()
    data: TrainingData
    objective: ObjectiveSettings = ObjectiveSettings()
    optimisation: Optimisation = Optimisation()
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: Output

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not is_delta_name(name):
            raise ValueError(f"{name!r} cannot name a delta")
        return name

    @field_validator("objective", mode="before")
    @classmethod
    def _read_objective(cls, objective: Any) -> Any:
        return {"name": objective} if isinstance(objective, str) else objective


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: the file is missing, is not YAML, or has a wrong or unknown key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"The recipe {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"The recipe {path} is not valid: {first_problem(error)}") from None
