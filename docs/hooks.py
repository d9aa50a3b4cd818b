"""What MkDocs builds besides this folder: the tables of ``benchmarks/`` and the changelog, where they lie.

Pages link to them as the repository does (``../benchmarks/results/quality.md``); the site holds them under
the same path, one folder higher.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BESIDES = ("CHANGELOG.md", "benchmarks/README.md", "benchmarks/NOTES.md", "benchmarks/results/*")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside of ``docs/``."""
    for path in sorted(path for pattern in BESIDES for path in ROOT.glob(pattern)):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of ``docs/`` into ``benchmarks/`` lose their ``../``: the site has one folder less."""
    return re.sub(r"\]\(\.\./(benchmarks/|CHANGELOG)", r"](\1", markdown)
