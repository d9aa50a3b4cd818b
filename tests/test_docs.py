"""What the README and docs/ show runs as printed, offline; what they list is whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lightning_uora import UORACallback
from lightning_uora.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- *(?P<mark>[^\n]*?) *-->\n)?```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```", re.M | re.S
)
"""A fenced block, and the marker on the line before it: why it does not run here."""


def blocks(page: Path, *kinds: str) -> list[tuple[str, str, str]]:
    """Kind, code and marker of a page's blocks, in order."""
    found = ((m["kind"], m["code"], m["mark"] or "") for m in FENCE.finditer(page.read_text()))
    return [one for one in found if one[0] in kinds]


def a_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=a_name)
def test_what_a_page_shows_runs_as_printed(page, tmp_path, monkeypatch, capsys):
    """Python and ``uora`` commands, in the order of the page, which build on one another."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "a_page"}
    for kind, code, mark in blocks(page, "python", "bash"):
        if kind == "python":
            compiled = compile(code, f"{a_name(page)}: {code.splitlines()[0]}", "exec")
            if not mark:
                exec(compiled, names)
        elif not mark:
            for line in re.findall(r"^uora .*$", code, re.M):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=a_name)
def test_a_snippet_that_needs_a_network_says_so_and_has_an_offline_twin(page):
    """A marked block says why it does not run; a page with one has Python that runs as well."""
    marks = [mark for _, _, mark in blocks(page, "python") if mark]
    assert all(mark.startswith("online; ") and "twin" in mark for mark in marks)
    if marks:
        assert any(not mark for _, _, mark in blocks(page, "python"))


@pytest.mark.filterwarnings("ignore")
def test_the_readmes_scripts_run_alone(tmp_path, monkeypatch):
    """Vision and text are whole scripts: each runs in an empty namespace."""
    monkeypatch.chdir(tmp_path)
    for _, code, _ in blocks(ROOT / "README.md", "python")[:2]:
        exec(compile(code, "README.md", "exec"), {"__name__": "a_script"})


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
