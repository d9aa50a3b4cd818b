"""What the README and docs/ show runs as printed, offline; what they list is whole."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import lightning_uora
from lightning_uora import UORACallback
from lightning_uora.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = Path(lightning_uora.__file__).parent  # the installed one, where the wheel is tested
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- *(?P<mark>[^\n]*?) *-->\n)?```(?P<kind>\w*)"
    r"(?: title=\"(?P<title>[^\"\n]*)\")?\n(?P<code>.*?)^```",
    re.M | re.S,
)
"""A fenced block, the marker on the line before it (why it does not run here), and the file that it is."""


def blocks(page: Path, *kinds: str) -> list[tuple[str, str, str]]:
    """Kind, code and marker of a page's blocks, in order."""
    found = ((m["kind"], m["code"], m["mark"] or "") for m in FENCE.finditer(page.read_text()))
    return [one for one in found if one[0] in kinds]


def a_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=a_name)
def test_what_a_page_shows_runs_as_printed(page, tmp_path, monkeypatch, capsys):
    """Python, ``uora`` commands and scripts of the page, in its order, which build on one another."""
    monkeypatch.chdir(tmp_path)
    for block in FENCE.finditer(page.read_text()):
        if block["title"]:
            Path(block["title"]).write_text(block["code"])
    if "import bitsandbytes" in page.read_text():
        pytest.importorskip("bitsandbytes")  # of the extra quantized
    names: dict = {"__name__": "a_page"}
    for kind, code, mark in blocks(page, "python", "bash"):
        if kind == "python":
            compiled = compile(code, f"{a_name(page)}: {code.splitlines()[0]}", "exec")
            if not mark:
                exec(compiled, names)
        elif not mark:
            for line in re.findall(r"^uora .*$", code, re.M):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
            for line in re.findall(r"^python (\w+\.py .*)$", code, re.M):
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
                runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=a_name)
def test_a_snippet_that_needs_a_network_says_so_and_has_an_offline_twin(page):
    """A marked block says why it does not run; a page with one has Python that runs as well."""
    marks = [mark for _, _, mark in blocks(page, "python") if mark]
    assert all(mark.startswith("online; ") and "twin" in mark for mark in marks)
    if marks:
        assert any(not mark for _, _, mark in blocks(page, "python"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=a_name)
def test_callbacks_in_yaml_can_be_made(page):
    for _, code, _ in blocks(page, "yaml"):
        for given in yaml.safe_load(code).get("trainer", {}).get("callbacks", []):
            parser = ArgumentParser()
            parser.add_subclass_arguments(Callback, "callback")
            made = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
            assert isinstance(made, UORACallback)


def test_the_readme_fits_a_page_and_every_link_leads_somewhere():
    """At most 130 lines; links into the repository exist, from the README and from every page."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                assert target == "CHANGELOG.md", f"{a_name(page)}: {target}"


def test_the_navigation_misses_no_page():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in DOCS.glob("*.md"):
        assert page.name in navigation, page.name


# Note [Which texts the page must have]
# Every message is found in the source: what is raised, what is warned of, and what the functions return that
# make messages for others (MAKERS). Of each, the page has the first constant piece of at least PIECE
# characters and two words, or else the longest, up to SHOWN
# characters: what a reader sees again, whatever was filled in.

PIECE, SHOWN = 14, 34
WARN = ("warnings.warn", "rank_zero_warn")
MAKERS = {
    "__str__", "_not_from_record", "_nothing_found", "_part", "_quantised", "_refusal", "_tied", "_unknown",
    "_unsupported_weight", "check_base", "invalid",
    "never_moved", "nothing_found",
    "nothing_inside", "passed_by", "place_of", "tied_beyond", "unreachable", "unreadable",
    "unsupported", "what_folder",
}  # fmt: skip
"""Functions whose strings are messages that others raise or warn of."""
PASSED_ON = {
    "AssertionError", "error", "message", "name", "one", "place.said", "said", "str(loss)",
}  # fmt: skip
"""What is raised or warned of without a text of its own: Python's protocol, or a text made elsewhere."""


def pieces(node: ast.AST) -> list[str]:
    """Constant pieces of a message, between what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [one.value for one in node.values if isinstance(one, ast.Constant)]
    if isinstance(node, ast.BinOp):
        return pieces(node.left) + pieces(node.right)
    return []


def shown(parts: list[str]) -> str:
    """The text by which a message is found."""
    plain = [piece.strip() for part in parts for piece in part.split("`")]
    first = next((one for one in plain if len(one) >= PIECE and " " in one), None)
    return (first or max(plain, key=len))[:SHOWN].strip()


def messages() -> Iterator[tuple[str, ast.expr]]:
    """Place and expression of everything that the package raises or warns of."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            place = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Raise) and node.exc is not None:
                call = node.exc
                maker = isinstance(call, ast.Call) and ast.unparse(call.func) in MAKERS
                yield place, call.args[0] if isinstance(call, ast.Call) and call.args and not maker else call
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in WARN:
                yield place, node.args[0]
            elif isinstance(node, ast.FunctionDef) and node.name in MAKERS:
                made = (one for one in ast.walk(node) if isinstance(one, (ast.JoinedStr, ast.Constant)))
                yield from (
                    (f"{path.relative_to(PACKAGE)}:{one.lineno}", one) for one in sentences(node, made)
                )


def sentences(function: ast.FunctionDef, made: Iterator[ast.expr]) -> Iterator[ast.expr]:
    """Strings of a function that are whole messages: long, filled in, and no docstring."""
    inner = {id(part) for one in ast.walk(function) if isinstance(one, ast.JoinedStr) for part in one.values}
    for one in made:
        if id(one) not in inner and isinstance(one, ast.JoinedStr) and len("".join(pieces(one))) > 24:
            yield one


def own_text(expression: ast.expr) -> bool:
    """Whether a message is written where it is raised; else it must be one that is made elsewhere."""
    if any(character.isalpha() for piece in pieces(expression) for character in piece):
        return True
    if isinstance(expression, ast.JoinedStr):
        return False  # nothing but what another library said
    made = {ast.unparse(one.func) for one in ast.walk(expression) if isinstance(one, ast.Call)}
    assert made & MAKERS or ast.unparse(expression) in PASSED_ON, ast.unparse(expression)
    return False


def test_every_error_and_warning_is_on_the_page_of_troubleshooting():
    """Found by its text; see Note [Which texts the page must have]."""
    page = " ".join((DOCS / "troubleshooting.md").read_text().split())
    missing, found = [], list(messages())
    assert len(found) > 200  # the package was looked into
    for place, expression in found:
        if own_text(expression):
            text = " ".join(shown(pieces(expression) or [ast.unparse(expression)]).split())
            if text not in page:
                missing.append(f"{place}: {text}")
    assert not missing, "\n".join(missing)


def in_one_line(name: str) -> str:
    """A public name with its arguments and defaults, without types."""
    given = getattr(lightning_uora, name)
    arguments = inspect.signature(given).parameters.values()
    plain = inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in arguments])
    return f"{name}{plain}".replace(f"reinit={lightning_uora.ReinitSchedule()!r}", "reinit=ReinitSchedule()")


def test_the_contract_is_what_the_page_says():
    """Public names, arguments, their order and defaults; a change fails until page and changelog follow."""
    page = (DOCS / "api.md").read_text()
    listed = page.partition("## In one view\n")[2].partition("```text\n")[2].partition("```")[0]
    assert listed.splitlines() == [in_one_line(name) for name in lightning_uora.__all__]
    for name in lightning_uora.__all__:
        assert re.search(rf"^::: lightning_uora\.(callback\.)?{name}$", page, re.M), name


def test_a_change_of_the_contract_since_the_last_version_is_in_the_changelog():
    """Each name whose line differs from the last version's is in the section of what is not released."""
    version, *before = (ROOT / "tests/fixtures/contract.txt").read_text().splitlines()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    latest = re.search(r"^## \[(\d[^]]*)\]", changelog, re.M)
    assert version == f"version {latest[1]}"  # a version that is cut takes its contract along
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## [")[0]
    changed = {line.partition("(")[0] for line in set(before) ^ set(map(in_one_line, lightning_uora.__all__))}
    assert [name for name in sorted(changed) if f"`{name}" not in unreleased] == []


def test_help_lists_every_public_name_and_the_callback_among_the_classes():
    """``help(lightning_uora)`` opens with what there is to use, the callback too, which is imported late."""
    shown = pydoc.render_doc(lightning_uora, renderer=pydoc.plaintext)
    opening = shown[: shown.index("PACKAGE CONTENTS")]
    assert [name for name in lightning_uora.__all__ if name not in opening] == []
    assert "class UORACallback" in shown


def test_without_lightning_help_lists_everything_but_the_callback(monkeypatch):
    monkeypatch.setattr(lightning_uora, "find_spec", lambda name: None)
    assert set(lightning_uora.__all__) - set(dir(lightning_uora)) == {"UORACallback"}
