"""What a command line of Lightning's refuses, in one line: jsonargparse buries it in lists and tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_uora.storage import check_whole

__all__ = ["one_line_errors", "reason"]

# Note [Refused values from YAML]
# jsonargparse tries every type that an argument may have, catches whatever a class raises, and raises a list
# of what each type said, with all values; or prints all options of the program, and then that list. No
# exception of ours gets past that. What the deepest class in the list said is what the user wants to know.

UNION, WITHIN, KEY = "Does not validate", "Problem with given class_path", "Parser key"
ITS_OWN = (UNION, WITHIN, KEY, "Cannot take a Union", "Expected a", "Not a valid", "a class path", "a dict ")
"""How the lines begin that jsonargparse writes about the types that a value might have had."""
LONGEST = 400
READ_BY = {
    ("lightning.pytorch.cli", "_parse_ckpt_path"): "ckpt_path",
    ("lightning.fabric.plugins.io.torch_io", "load_checkpoint"): "path",
}
"""Lightning's functions that read a checkpoint, and what they call its path."""


def reason(message: str) -> str:
    """What was wrong, out of jsonargparse's list; the message in one line where it is no such list."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    bare = [line.removeprefix("- ") for line in lines]
    last = next((n for n in reversed(range(len(bare))) if bare[n].startswith((WITHIN, KEY))), None)
    said = [line[2:] for line in lines if line.startswith("- ") and not line[2:].startswith(ITS_OWN)]
    if said:
        return said[0]
    if last is None:
        whole = " ".join(lines)
        return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} ..."
    key = f"{bare[last].split(chr(34))[1]}: " if bare[last].startswith(KEY) else ""
    told = bare[last + 1 :]
    if told and told[0].startswith(UNION):
        given = next((line.partition(": ")[2] for line in told if line.startswith("Given value: ")), "")
        return f"{key}{given!r} is none of {told[1].removeprefix('Subtypes: ')}"
    return f"{key}{told[0] if told else bare[last]}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around ``LightningCLI(...)``: what YAML or flags have wrong is one line, and exit code 2.

    Those are a name or a value that jsonargparse or a class refuses, and what this package refuses of a model
    (targets that match nothing) or of a checkpoint (not there, cut off). Errors raised later, such as in
    training, pass through unchanged. See Note [Refused values from YAML].

    Example::

        with one_line_errors():
            LightningCLI(MyModule, MyData)
    """
    from jsonargparse import ArgumentParser

    def error(parser: Any, message: str, ex: Exception | None = None) -> NoReturn:
        raise _RefusedError(message) from ex

    usual, kind = ArgumentParser.error, cast(Any, ArgumentParser)
    kind.error = error
    try:
        yield
    except _RefusedError as refused:
        _leave(f"{reason(str(refused))} (--help tells what there is)")
    except (ValueError, MisconfigurationException) as raised:
        message = str(raised)
        if UNION in message and reason(message) != message:
            _leave(reason(message))
        if not _is_ours(raised):
            raise
        _leave(" ".join(message.split()))
    except Exception as raised:
        if (path := _checkpoint_read(raised)) is None:
            raise
        _leave_if_unreadable(path)
        raise
    finally:
        kind.error = usual


class _RefusedError(Exception):
    """What jsonargparse would have printed below all options of the program."""


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("lightning_uora.")


def _checkpoint_read(error: BaseException) -> str | None:
    """The path that Lightning was reading a checkpoint from."""
    for frame, _ in walk_tb(error.__traceback__):
        where = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if where in READ_BY:
            return str(frame.f_locals[READ_BY[where]])
    return None


def _leave_if_unreadable(path: str) -> None:
    if "://" in path:
        return
    if not Path(path).exists():
        folder = Path(path).parent
        here = ", ".join(sorted(one.name for one in folder.glob("*.ckpt"))[:4]) or "no checkpoint"
        _leave(f"the checkpoint {path} does not exist; {folder} holds {here}")
    try:
        check_whole(path)
    except ValueError as cut:
        _leave(str(cut))


def _leave(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
