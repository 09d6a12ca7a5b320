"""The ``cmc`` field in the server's OpenAPI schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from cmc_server.api.controls import CMC_FIELD, STEERED_ROUTES, CmcField

_SCHEMA_NAME = "CmcControls"
_PREFIX = "#/components/schemas/"


def describe_controls(app: FastAPI) -> None:
    """Add the field to the request bodies of the steered routes, whenever the schema is generated."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_field(generate())
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def _add_field(schema: dict[str, Any]) -> None:
    definitions = schema.setdefault("components", {}).setdefault("schemas", {})
    field = CmcField.model_json_schema(ref_template=_PREFIX + "{model}")
    definitions.update(field.pop("$defs"))
    definitions[_SCHEMA_NAME] = field
    for route in STEERED_ROUTES:
        content = schema["paths"].get(route, {}).get("post", {}).get("requestBody", {}).get("content", {})
        reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        request = definitions.get(reference.removeprefix(_PREFIX))
        if request is not None:
            request.setdefault("properties", {})[CMC_FIELD] = {"$ref": _PREFIX + _SCHEMA_NAME}
