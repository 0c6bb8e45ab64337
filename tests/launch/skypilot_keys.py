"""Writes what SkyPilot's published schema allows, `skypilot_keys.json` beside this file, from the installed package.

    python -m tests.launch.skypilot_keys        needs skypilot, whose own requirements exclude those of this project

The types that each key of a task, and of its resources, may have; a test compares `launch/skypilot.yaml` with them.
"""

import json
from importlib.metadata import version
from pathlib import Path

PATH = Path(__file__).with_name("skypilot_keys.json")


def types(schema: dict) -> list[str]:
    """Names of the JSON types that a property may have, those of its alternatives included."""
    found: set[str] = set()
    for one in (schema, *schema.get("anyOf", []), *schema.get("oneOf", [])):
        kind = one.get("type", [])
        found |= {kind} if isinstance(kind, str) else set(kind)
        found |= {type(value).__name__.replace("str", "string") for value in one.get("enum", ())}
    return sorted(found)


def keys() -> dict[str, object]:
    """The table, of the SkyPilot that is installed."""
    from sky.utils import schemas

    parts = {"task": schemas.get_task_schema(), "resources": schemas.get_resources_schema()}
    table = {name: {key: types(value) for key, value in part["properties"].items()} for name, part in parts.items()}
    return {"version": version("skypilot"), **table}


if __name__ == "__main__":
    PATH.write_text(json.dumps(keys(), indent=1, sort_keys=True) + "\n")
