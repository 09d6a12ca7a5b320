"""``cmc_delta.json``: what a delta says of itself. Every field is optional; a folder without the file works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cmc_server.config import Unmapped, first_problem
from cmc_server.delta.weight_files import read_json
from cmc_server.errors import DeltaError

MANIFEST_FILE = "cmc_delta.json"


def _compiled(template: str) -> str:
    from cmc_server.delta.prompt import compile_template

    compile_template(template)
    return template


#: Source of a Jinja template that compiles in the sandbox.
PromptTemplate = Annotated[str, Field(min_length=1, max_length=65_536), AfterValidator(_compiled)]


class DeltaManifest(BaseModel):
    """The manifest of one delta model.

    Args:
        format_version: version of this file's format.
        name: suggested name; the operator's ``--delta NAME=PATH`` wins.
        description: one sentence for people.
        template_llm: the frozen partner of the training.
        objective: the training objective, such as ``instruction_tuning``.
        default_strength: strength of a request that gives none.
        advised_range: lowest and highest strength found useful in evaluation.
        prompt_template: Jinja template over ``messages`` for chat-like requests; None is the built-in default.
        bos: whether the delta reads a bos token first; None is the tokenizer's own default.
        context_length: longest input in tokens that the delta was trained on.
        unmapped: what happens to user tokens outside the map, see ``fusion.rule``.
        training: provenance: data hash, seed, steps, metrics.
        license: SPDX identifier or text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    name: str | None = None
    description: str = ""
    template_llm: str | None = None
    objective: str | None = None
    default_strength: float = 1.0
    advised_range: tuple[float, float] | None = None
    prompt_template: PromptTemplate | None = None
    bos: bool | None = None
    context_length: int | None = Field(default=None, ge=8)
    unmapped: Unmapped | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    license: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> DeltaManifest:
        if self.advised_range is not None and self.advised_range[0] > self.advised_range[1]:
            raise ValueError("advised_range must be [lowest, highest]")
        return self

    @classmethod
    def read(cls, folder: Path) -> DeltaManifest:
        """The manifest of a delta folder; all defaults where the folder has none.

        Raises:
            DeltaError: the file is not valid JSON or does not fit the format.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            return cls()
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise DeltaError(f"{path} is not a valid delta manifest: {first_problem(error)}") from None

    def write(self, folder: Path) -> None:
        """Write the manifest into a delta folder, without the fields left at None."""
        text = json.dumps(self.model_dump(exclude_none=True), indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
