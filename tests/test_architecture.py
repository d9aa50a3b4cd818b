"""The floors: an import points down, never up or sideways."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lightning_uora

FLOORS = {
    "functional": 0,
    "config": 0,
    "rotation": 0,
    "patches": 0,
    "untouched": 0,
    "loaders": 0,
    "shared_inputs": 0,
    "sharding": 0,
    "kinds": 1,
    "moments": 1,
    "projection": 1,
    "ranks": 1,
    "fingerprints": 1,
    "manifest": 1,
    "layers": 2,
    "roles": 2,
    "targets": 3,
    "observer": 3,
    "weakness": 3,
    "injection": 4,
    "growth": 4,
    "passes": 4,
    "refresh": 5,
    "calibration": 5,
    "restoring": 6,
    "refresher": 6,
    "report": 6,
    "inspection": 6,
    "adapter_files": 7,
    "checkpoint": 7,
    "training_batches": 7,
    "attachment": 7,
    "counting": 7,
    "merging": 8,
    "interop": 8,
    "companions": 8,
    "callback": 9,
    "cli": 9,
}
LIGHTNING = ("attachment", "callback", "companions", "counting", "training_batches")
PACKAGE = Path(lightning_uora.__file__).parent


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def test_every_module_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(FLOORS)


def test_imports_point_down_only():
    for name, level in FLOORS.items():
        for target in imports(PACKAGE / f"{name}.py"):
            if target.startswith("lightning_uora"):
                assert FLOORS[target.removeprefix("lightning_uora.")] < level, f"{name} imports {target}"


def test_only_the_callback_and_its_parts_import_lightning_and_config_needs_no_torch():
    for name in FLOORS:
        roots = {target.split(".")[0] for target in imports(PACKAGE / f"{name}.py")}
        assert "lightning" not in roots or name in LIGHTNING, name
        assert "pytorch_lightning" not in roots
        assert "transformers" not in roots
        if name == "config":
            assert not roots & {"torch", "rich"}


def test_every_note_that_is_pointed_to_is_there_and_none_is_forgotten():
    written = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    title = re.compile(r"^ *# Note \[(.+)\]$", re.MULTILINE)
    pointers = re.findall(r"Note\s+\[([^]]+)\]", title.sub("", written))
    assert {" ".join(name.replace("#", " ").split()) for name in pointers} == set(title.findall(written))
