"""A YAML file checked against a pydantic model: what is wrong is named by its key and line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cmc_server.errors import ConfigError, one_line

_Model = TypeVar("_Model", bound=BaseModel)


class ConflictError(ValueError):
    """Settings that do not fit together, for a model's validator to raise.

    Args:
        keys: where, from the model that raises.
        message: what, and what to do.
    """

    def __init__(self, keys: Sequence[str], message: str) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


def read_yaml(path: Path) -> yaml.Node:
    """The nodes of a YAML file, which know their lines.

    Raises:
        ConfigError: the file is missing, is not YAML, holds no mapping, or gives a key twice.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"The recipe {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"The recipe {path} cannot be read as YAML: {one_line(error)}.") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"The recipe {path} must hold a mapping of keys, such as `name: my-delta`.")
    try:
        twice = _repeated_key(node)
    except RecursionError:  # also by an anchor within itself
        raise ConfigError(f"The recipe {path} is nested without end; write it without the anchor.") from None
    if twice is not None:
        raise ConfigError(f"The recipe {path} is not valid: line {_line(twice)}: {twice.value}: is given twice.")
    return node


def validate(model: type[_Model], node: yaml.Node, path: Path) -> _Model:
    """Build ``model`` from the nodes of a file.

    Raises:
        ConfigError: a key is unknown, missing or has a wrong value; the sentence names the first one and its line.
    """
    try:
        values = yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"The recipe {path} cannot be read as YAML: {one_line(error)}.") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
    keys: tuple[int | str, ...] = problem["loc"]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConflictError):
        keys = (*keys, *cause.keys)
    found, line = _locate(node, keys)
    if problem["type"] == "missing":
        found.append(str(keys[-1]))
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    place = f"line {line}: {'.'.join(found)}: " if found else ""
    raise ConfigError(f"The recipe {path} is not valid: {place}{message}.")


def _locate(node: yaml.Node, keys: Sequence[int | str]) -> tuple[list[str], int]:
    """The part of ``keys`` that the file has, and the line of its last key.

    What pydantic adds to the path (the member of a union) is in no file and left out.
    """
    found: list[str] = []
    line = _line(node)
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = _line(node)
        elif isinstance(node, yaml.MappingNode) and key in (names := [name.value for name, _ in node.value]):
            name, node = node.value[names.index(str(key))]
            line = _line(name)
        else:
            continue
        found.append(str(key))
    return found, line


def _repeated_key(node: yaml.Node) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode):
        return next((twice for child in node.value if (twice := _repeated_key(child))), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    seen: set[str] = set()
    for name, child in node.value:
        if isinstance(name, yaml.ScalarNode):
            if name.value in seen:
                return name
            seen.add(name.value)
        if twice := _repeated_key(child):
            return twice
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
