"""The rooms: imports point down, through doors; and what the package imports when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_uora

HOUSE = (
    ("callback", "cli", "yaml_errors"),
    ("trainer",),
    ("storage", "inputs"),
    ("reports", "reinit"),
    ("adapters",),
    ("distributed", "config"),
)
"""Rooms, and files beside them, from the top; what stands in one row does not know of each other."""
INSIDE = {
    "trainer": (
        ("companions", "refreshing"),
        ("attachment", "calibrating", "guarding", "loggers", "resuming", "warnings"),
        ("rates",),
        ("training_batches", "steps", "vector_groups"),
        ("loaders", "schedules", "writing"),
    ),
    "storage": (
        ("merging", "peft", "bank"),
        ("peft_rules",),
        ("adapter_files", "checkpoint", "peft_formats", "peft_names"),
        ("several_roots",),
        ("placing", "low_rank", "waiting"),
        ("restoring",),
        ("verifying",),
        ("manifest", "fingerprints", "folders", "unpickling", "weight_readers"),
    ),
    "inputs": (
        ("calibration",),
        ("passes",),
        ("observer", "moments", "shared_inputs", "untouched"),
        ("patches",),
    ),
    "reports": (("contents", "figures", "inspection", "meta_models", "progress", "report"), ("step_peak",)),
    "reinit": (("schedule",), ("refresh",), ("growth", "known_rows"), ("weakness", "rotation")),
    "adapters": (
        ("several", "mixing"),
        ("attach", "mixed_layers"),
        ("merged", "mixing_experts"),
        ("several_layers",),
        ("shelf",),
        ("resizing", "norm_statistics"),
        ("attachments", "targets", "specialise"),
        ("forms", "roles", "passing", "wrong_targets", "experts"),
        ("around", "own_layers"),
        ("layers", "role_names"),
        ("kinds", "projections", "stand_in"),
        ("stacked", "by_row"),
        ("freshness", "functional", "draws", "effective", "names"),
        ("own_rows", "opaque", "matrix_names", "watching"),
        ("offloaded",),
    ),
    "distributed": (("processes",), ("sharding",)),
}
"""Files of each room from the top, likewise."""
PACKAGE = Path(lightning_uora.__file__).parent
FILES = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"]


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def rows(plan: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return {name: row for row, names in enumerate(plan) for name in names}


def room_of(path: Path) -> str:
    return path.stem if path.parent == PACKAGE else path.parent.name


def own(path: Path) -> list[list[str]]:
    """What a file takes from this package, as parts of dotted names."""
    return [t.split(".")[1:] for t in imports(path) if t.split(".")[0] == "lightning_uora"]


def test_every_file_has_its_place():
    assert {room_of(path) for path in FILES} == set(rows(HOUSE))
    for room, plan in INSIDE.items():
        assert {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"} == set(rows(plan)), room


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_down_and_stay_outside_of_other_rooms_doors(path: Path):
    house, room = rows(HOUSE), room_of(path)
    for target in own(path):
        assert target, "from lightning_uora import ..."
        if target[0] != room:
            assert house[target[0]] > house[room], target
            assert len(target) == 1, f"{'.'.join(target)} is behind a door"
        elif path.stem != "__init__":
            inside = rows(INSIDE[room])
            assert len(target) == 2, "a room's own door"
            assert inside[target[1]] > inside[path.stem], target
        assert not any(t.startswith(".") for t in imports(path))


@pytest.mark.parametrize("room", INSIDE)
def test_a_door_says_what_the_room_is_for_and_hands_on_what_is_taken_alone(room: str):
    door = ast.parse((PACKAGE / room / "__init__.py").read_text())
    sentence = ast.get_docstring(door)
    assert sentence
    assert sentence.count("\n") == 0
    handed = {a.name for node in door.body if isinstance(node, ast.ImportFrom) for a in node.names}
    taken = set()
    for path in [*FILES, PACKAGE / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == f"lightning_uora.{room}":
                taken |= {alias.name for alias in node.names}
    told = set(re.findall(rf"lightning_uora\.{room}\.(\w+)\(", "".join(p.read_text() for p in FILES)))
    assert handed == taken | told


def test_only_lightnings_side_imports_lightning_and_config_needs_no_torch():
    for path in FILES:
        roots = {target.split(".")[0] for target in imports(path)}
        assert "lightning" not in roots or room_of(path) in ("trainer", "callback", "cli", "yaml_errors"), (
            path
        )
        assert not roots & {"pytorch_lightning", "transformers"}, path
        if path.stem == "config":
            assert not roots & {"torch", "rich"}


def run(program: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_lightning_all_works_but_the_callback_which_says_what_to_install():
    said = run("""
        import sys
        sys.modules["lightning"] = None
        import tempfile, torch, lightning_uora as uora
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        uora.attach_uora(model, uora.UORAConfig(rank=2, target_modules="all-linear"))
        uora.refresh(model, uora.ReinitSchedule(threshold=0.5))
        with tempfile.TemporaryDirectory() as folder:
            uora.save_adapter(model, folder)
            uora.detach_uora(model)
            print(uora.load_adapter(model, folder))
            uora.export_peft(model, folder)
        for name in set(uora.__all__) - {"UORACallback"}:
            getattr(uora, name)
        try:
            uora.UORACallback
        except ImportError as error:
            print(error)
    """)
    assert said == "['0', '1']\nUORACallback needs Lightning: pip install lightning\n"


def test_importing_the_package_imports_what_it_needs_and_no_more():
    loaded = run("""
        import sys
        import rich.console, rich.table, safetensors.torch, torch.distributed.tensor, typing_extensions
        before = set(sys.modules)
        import lightning_uora
        print(*{m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))
    """)
    assert loaded.split() == ["lightning_uora"]


def test_every_note_that_is_pointed_to_is_there_and_none_is_forgotten():
    written = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    title = re.compile(r"^ *# Note \[(.+)\]$", re.MULTILINE)
    pointers = re.findall(r"Note\s+\[([^]]+)\]", title.sub("", written))
    assert {" ".join(name.replace("#", " ").split()) for name in pointers} == set(title.findall(written))
