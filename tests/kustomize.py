"""Just enough of ``kustomize build`` to look at its result: resources, components, patches (RFC 6902), images.

Anything else in a kustomization is refused, so that the files cannot outgrow what the tests understand. Within one
kustomization the order is kustomize's: resources, components, patches, images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

_KEYS = {"apiVersion", "kind", "resources", "components", "patches", "images"}

Resource = dict[str, Any]


def render(folder: Path) -> list[Resource]:
    """The resources that ``kustomize build`` gives for this folder."""
    return _extended([], folder)


def _extended(resources: list[Resource], folder: Path) -> list[Resource]:
    """These resources after a kustomization has added its own and changed all of them."""
    (kustomization,) = _documents(folder / "kustomization.yaml")
    assert set(kustomization) <= _KEYS, f"{folder} uses more of kustomize than the tests understand"
    for entry in kustomization.get("resources", []):
        path = folder / entry
        resources = [*resources, *(render(path) if path.is_dir() else _documents(path))]
    for entry in kustomization.get("components", []):
        resources = _extended(resources, folder / entry)
    for entry in kustomization.get("patches", []):
        _patch_targets(resources, entry, folder)
    for image in kustomization.get("images", []):
        for container in (found for resource in resources for found in containers(resource)):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return resources


def containers(node: Any) -> Iterator[Resource]:
    """Every container below ``containers`` or ``initContainers``, in any kind of resource."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        if key in ("containers", "initContainers"):
            yield from child
        yield from containers(child)


def _documents(path: Path) -> list[Resource]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def _patch_targets(resources: list[Resource], entry: Mapping[str, Any], folder: Path) -> None:
    target = entry["target"]
    assert set(target) <= {"kind", "name"}
    operations = yaml.safe_load(entry["patch"] if "patch" in entry else (folder / entry["path"]).read_text("utf-8"))
    matching = [
        resource
        for resource in resources
        if resource["kind"] == target["kind"]
        and resource["metadata"]["name"] == target.get("name", resource["metadata"]["name"])
    ]
    assert matching, f"nothing in {folder} is a {target}"
    for resource in matching:
        for operation in operations:
            _apply(resource, operation)


def _apply(document: Resource, operation: Mapping[str, Any]) -> None:
    """One operation of RFC 6902 (https://datatracker.ietf.org/doc/html/rfc6902)."""
    verb, path = operation["op"], operation["path"]
    if verb == "add":
        _add(document, path, copy.deepcopy(operation["value"]))
    elif verb == "remove":
        _remove(document, path)
    elif verb == "replace":
        _remove(document, path)
        _add(document, path, copy.deepcopy(operation["value"]))
    elif verb == "move":
        _add(document, path, _remove(document, operation["from"]))
    elif verb == "copy":
        parent, key = _locate(document, operation["from"])
        _add(document, path, copy.deepcopy(parent[key]))
    else:
        raise AssertionError(f"unknown operation {verb}")


def _locate(document: Any, pointer: str) -> tuple[Any, Any]:
    """Where a JSON pointer (RFC 6901) leads: the parent, and the key or index in it."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part]
    if isinstance(document, list):
        return document, len(document) if last == "-" else int(last)
    return document, last


def _add(document: Any, pointer: str, value: Any) -> None:
    parent, key = _locate(document, pointer)
    if isinstance(parent, list):
        parent.insert(key, value)
    else:
        parent[key] = value


def _remove(document: Any, pointer: str) -> Any:
    parent, key = _locate(document, pointer)
    return parent.pop(key)
