"""What a command line of Lightning's refuses, in one line: jsonargparse buries it in a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_line_errors", "reason"]

# Note [Refused values from YAML]
# jsonargparse tries every type that an argument may have, catches whatever a class raises, and raises a list
# of what each type said, with all values. No exception of ours gets past that, and types checked when the
# YAML is parsed (PositiveInt) give the same list and know nothing of two values that do not go together.

UNION = "Does not validate"
ITS_OWN = (UNION, "Expected a", "Not a valid", "a class path", "a dict ")
"""How the lines begin that jsonargparse writes about the types that a value might have had."""


def reason(message: str) -> str:
    """What a callback, a model or data said, out of jsonargparse's list; the message where there is none."""
    said = [line.strip()[2:] for line in message.splitlines() if line.strip().startswith("- ")]
    return next((line for line in said if not line.startswith(ITS_OWN)), message)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around ``LightningCLI(...)``: a value that a class refuses is one line, and exit code 2.

    Errors raised later, such as in training, pass through unchanged. See Note [Refused values from YAML].

    Example::

        with one_line_errors():
            LightningCLI(MyModule, MyData)
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        if UNION not in message or reason(message) == message:
            raise
        sys.stderr.write(f"error: {reason(message)}\n")
        sys.exit(2)
