"""Docstrings as this site wants them: ``Example:`` is a section, and Sphinx's roles are plain names."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Plain(griffe.Extension):
    """Change the text of docstrings before they are parsed; the code keeps its own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of every module, class and function."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            text = re.sub(r"^Example::$", "For example:", text, flags=re.M)
            obj.docstring.value = re.sub(r":(?:func|class|meth):`~?([^`]+)`", r"`\1`", text)
