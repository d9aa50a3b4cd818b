"""The floors: an import points down, never up or sideways."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_uora

FLOORS = {
    "functional": 0,
    "config": 0,
    "rotation": 0,
    "projection": 1,
    "layers": 2,
    "targets": 3,
    "injection": 4,
    "refresh": 4,
    "report": 5,
    "manifest": 5,
    "adapter_files": 6,
    "checkpoint": 6,
    "interop": 7,
    "callback": 8,
    "cli": 8,
}
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


def test_only_the_callback_imports_lightning_and_config_needs_no_torch():
    for name in FLOORS:
        roots = {target.split(".")[0] for target in imports(PACKAGE / f"{name}.py")}
        assert "lightning" not in roots or name == "callback", name
        assert "pytorch_lightning" not in roots
        assert "transformers" not in roots
        if name == "config":
            assert not roots & {"torch", "rich"}
