"""``RECIPE.yaml``: everything that decides what a trained delta becomes. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from pydantic import model_validator as validator
from pydantic_core.core_schema import SerializationInfo

from cmc_server.config import FrozenModel, is_delta_name
from cmc_server.delta.manifest import PromptTemplate
from cmc_server.training.objectives import AnyObjective, InstructionTuning
from cmc_server.training.recipe_file import ConflictError, read_yaml, validate

#: Nobody's delta is wider or deeper; what is would be made for hours before memory runs out.
_LARGEST = 16384


def _yaml_no(value: Any) -> Any:
    """YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


class DeltaSize(FrozenModel):
    """Where a delta starts: a Llama of some shape with random weights and tied embeddings, or a model that exists.

    Args:
        start_from: folder or hub id of a small causal LM with the template's vocabulary, in safetensors, instead of a
            shape.
        hidden_size: width of the model.
        num_layers: number of decoder layers.
        num_heads: attention heads; must divide ``hidden_size`` into even parts.
        intermediate_size: width of the feed-forward part.
        initializer_range: standard deviation of the random weights.
    """

    start_from: str | None = None
    hidden_size: int = Field(default=96, ge=2, le=_LARGEST)
    num_layers: int = Field(default=2, ge=1, le=_LARGEST)
    num_heads: int = Field(default=3, ge=1)
    intermediate_size: int = Field(default=256, ge=1, le=_LARGEST)
    initializer_range: float = Field(default=0.02, gt=0)

    @validator(mode="after")
    def _one_start(self) -> DeltaSize:
        if self.start_from is not None and len(self.model_fields_set) > 1:
            raise ValueError("start_from brings its own shape; give either that or a shape")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_heads")
        return self


class Columns(FrozenModel):
    """Names of a record's columns.

    A record with ``messages`` is a chat, one with ``text`` plain text, any other a prompt with its answers.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"
    text: str = "text"
    chosen: str = "chosen"
    rejected: str = "rejected"


class DataSource(FrozenModel):
    """Records to read; a recipe may give the file alone.

    Args:
        file: JSON lines, relative to the recipe.
        dataset: instead of a file, a dataset for the ``datasets`` library: a hub id or a folder.
        name: configuration of that dataset.
        split: its split, such as ``train`` or ``train[:40]``.
        revision: its version on the hub.
        columns: names of the columns.
    """

    file: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Columns = Columns()

    @validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @validator(mode="after")
    def _one_source(self) -> DataSource:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give either file or dataset")
        only = {"name", "split", "revision"} & self.model_fields_set
        if self.file is not None and only:
            raise ConflictError((min(only),), "belongs to a dataset, not to a file")
        return self

    @model_serializer(mode="wrap")
    def _shortest(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        # However a recipe writes it, one file is hashed as one text.
        return self.file if info.exclude_unset and self.model_fields_set == {"file"} else handler(self)


class TrainingData(FrozenModel):
    """What to learn from, and how the template LLM's hidden states are kept.

    Args:
        train: answers to learn, for tuning objectives; pairs of answers for ``dpo``.
        forget: answers to forget, for unlearning objectives.
        retain: answers to keep beside them; one is drawn for each item of a batch.
        heldout: records whose loss is measured after every epoch, for objectives with ``train``.
        max_length: longest input in tokens; longer records are left out, with a warning.
        cache: where the hidden states are kept: in ``memory``, on ``disk``, or ``none``, which computes them again for
            every batch.
        cache_budget_gib: most that they may take there, in GiB; a run that needs more is refused at its start.
        cache_folder: folder of the files; the package's cache by default.
    """

    train: DataSource | None = None
    forget: DataSource | None = None
    retain: DataSource | None = None
    heldout: DataSource | None = None
    max_length: int = Field(default=1024, ge=8)
    cache: Literal["memory", "disk", "none"] = "memory"
    cache_budget_gib: float = Field(default=8.0, gt=0)
    cache_folder: str | None = None

    @validator(mode="after")
    def _no_idle_setting(self) -> TrainingData:
        if self.cache != "disk" and self.cache_folder is not None:
            raise ConflictError(("cache_folder",), "is for cache: disk")
        if self.cache == "none" and "cache_budget_gib" in self.model_fields_set:
            raise ConflictError(("cache_budget_gib",), "has no use with cache: none")
        return self

    @property
    def sources(self) -> dict[str, DataSource]:
        """What is given, by key."""
        pairs = ((key, getattr(self, key)) for key in ("train", "forget", "retain", "heldout"))
        return {key: source for key, source in pairs if source is not None}


class Optimisation(FrozenModel):
    """AdamW with a warm-up; weights and optimiser states are float32.

    Args:
        epochs: passes over the data.
        batch_size: records per device and micro-batch.
        gradient_accumulation_steps: micro-batches per step; the gradient is the mean of theirs.
        learning_rate: the highest one.
        lr_scheduler_type: how it changes after the warm-up, by transformers' name.
        weight_decay: decoupled, on matrices only.
        warmup_share: part of the steps in which the learning rate rises.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: type that the delta computes in beside its float32 weights; fp16 needs a GPU.
    """

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_yaml_no)] = "no"


class Checkpoints(FrozenModel):
    """When a run keeps what it needs to go on after it was killed. They are removed when it ends.

    Args:
        save_strategy: after every ``epoch``, every so many ``steps``, or ``no``.
        save_steps: steps between two of them.
        save_total_limit: how many are kept.
    """

    save_strategy: Annotated[Literal["epoch", "steps", "no"], BeforeValidator(_yaml_no)] = "epoch"
    save_steps: int = Field(default=100, ge=1)
    save_total_limit: int = Field(default=1, ge=1)

    @validator(mode="after")
    def _no_idle_setting(self) -> Checkpoints:
        if self.save_strategy != "steps" and "save_steps" in self.model_fields_set:
            raise ConflictError(("save_steps",), "is for save_strategy: steps")
        if self.save_strategy == "no" and "save_total_limit" in self.model_fields_set:
            raise ConflictError(("save_total_limit",), "has no use with save_strategy: no")
        return self


class Output(FrozenModel):
    """The delta folder that training writes.

    Args:
        folder: where, relative to the recipe; ``--output`` wins.
        dtype: type of the stored weights. float16 keeps three more bits of them than bfloat16.
        default_strength: see :class:`~cmc_server.delta.manifest.DeltaManifest`.
        advised_range: likewise.
        prompt_template: likewise; the delta is trained with it as well.
        bos: likewise.
        curvature: what ``cmc-server merge`` may need, in a folder inside the delta's: from the ``optimiser``'s second
            moments, at no cost, or from labels ``sampled`` after training, at the cost of an epoch with batches of one.
    """

    folder: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    default_strength: float = 1.0
    advised_range: tuple[float, float] | None = None
    prompt_template: PromptTemplate | None = None
    bos: bool | None = None
    curvature: Literal["none", "optimiser", "sampled"] = "none"

    @field_validator("folder")
    @classmethod
    def _named(cls, folder: str) -> str:
        if not folder.strip():
            raise ValueError("must name a folder")
        return folder

    @validator(mode="after")
    def _ordered(self) -> Output:
        # As the manifest checks it, but before the training.
        if self.advised_range is not None and self.advised_range[0] > self.advised_range[1]:
            raise ConflictError(("advised_range",), "must be [lowest, highest]")
        return self


class Recipe(FrozenModel):
    """One training run.

    Args:
        name: the delta's name.
        description: one sentence for people.
        license: of the delta, as an SPDX identifier.
        template: the frozen template LLM, a hub id or a folder, or a list of several, whose losses are averaged; the
            delta has the vocabulary of the first one. ``--template`` wins.
        delta: where the delta starts.
        data: what to learn.
        objective: how, the name of an objective, or a mapping of its ``name`` and options.
        optimisation: how fast and how long.
        checkpoint: when to keep what an interrupted run needs.
        seed: of the weights, of the order of the data, and of all draws.
        output: what is written.
    """

    name: str
    description: str = ""
    license: str | None = None
    template: str | Annotated[tuple[str, ...], Field(min_length=1)]
    delta: DeltaSize = DeltaSize()
    data: TrainingData
    objective: AnyObjective = InstructionTuning()
    optimisation: Optimisation = Optimisation()
    checkpoint: Checkpoints = Checkpoints()
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: Output

    @property
    def templates(self) -> tuple[str, ...]:
        """All template LLMs."""
        return (self.template,) if isinstance(self.template, str) else self.template

    @property
    def main(self) -> str:
        """The key of ``data`` that the objective learns from: ``train`` or ``forget``."""
        return "train" if self.data.train is not None else "forget"

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not is_delta_name(name):
            raise ValueError(f"{name!r} cannot name a delta")
        return name

    @field_validator("objective", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @validator(mode="after")
    def _data_fit(self) -> Recipe:
        objective, given = self.objective, self.data.sources
        for key in ("train", "forget"):
            if key in given and key not in objective.main:
                raise ConflictError(("data", key), f"{objective.name} reads data.{' or data.'.join(objective.main)}")
        if sum(key in given for key in objective.main) != 1:
            raise ConflictError(("data",), f"{objective.name} needs data.{' or else data.'.join(objective.main)}")
        if objective.retain == "required" and "retain" not in given:
            raise ConflictError(("data",), f"{objective.name} needs data.retain")
        if objective.retain == "refused" and "retain" in given:
            raise ConflictError(("data", "retain"), f"{objective.name} has no retain term; choose another objective")
        if "heldout" in given and self.main != "train":
            raise ConflictError(("data", "heldout"), "is for objectives that read data.train")
        if objective.name == "logit_shift" and len(self.templates) > 1:
            raise ConflictError(("template",), "logit_shift takes one template, the one that was tuned")
        return self

    @validator(mode="after")
    def _no_idle_setting(self) -> Recipe:
        objective, given = self.objective, self.data.sources
        if "retain" not in given and "retain_weight" in objective.model_fields_set:
            raise ConflictError(("objective", "retain_weight"), "needs data.retain")
        if objective.name == "dpo" and self.main == "train" and "refusals" in objective.model_fields_set:
            raise ConflictError(("objective", "refusals"), "is for data.forget; data.train brings both answers")
        for key, source in given.items():
            idle = {"chosen", "rejected"} & source.columns.model_fields_set
            if idle and not (objective.name == "dpo" and key in ("train", "heldout")):
                raise ConflictError(("data", key, "columns", min(idle)), "is for the pairs of dpo's data.train")
        return self


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: the file is missing, is not YAML, or has a wrong or unknown key; the message names key and line.
    """
    return validate(Recipe, read_yaml(path), path)
