"""The data of the built-in tasks: files that the user has, or that scikit-learn brings. Nothing is downloaded."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gradcentral.experiment.errors import TaskError
from gradcentral.extras import optional

__all__ = [
    "DATA",
    "DIABETES",
    "FASHION",
    "TEXT",
    "cifar100_folder",
    "devils_dictionary",
    "diabetes",
    "fashion_mnist",
    "find",
]

DATA = "GRADCENTRAL_DATA"
"""The environment variable that names a folder with the files below; it is searched before the Debian paths."""
FASHION = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
TEXT, DIABETES = "devil.dict.dz", "diabetes.csv"
_DEBIAN = {TEXT: ("dict-devil", Path("/usr/share/dictd"))} | dict.fromkeys(
    FASHION, ("dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist"))
)


def find(name: str) -> Path:
    """Return the path of a file in the folder of the user, or where its Debian package puts it.

    Raises:
        TaskError: there is no such file; the message names the package and the variable.
    """
    package, installed = _DEBIAN[name]
    given = os.environ.get(DATA)
    folders = ([Path(given).expanduser()] if given else []) + [installed]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise TaskError(
        f"{name} was not found in {' or '.join(map(str, folders))}: install Debian's package {package}, or set "
        f"{DATA} to a folder with the file (apt-get download {package}; dpkg-deb -x {package}_*.deb .)"
    )


def fashion_mnist(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Load the first images of a part, ``"train"`` or ``"t10k"``, and their classes: 28×28 pixels reduced to 16×16.

    The pixels ``[count, 1, 16, 16]`` have about mean 0 and standard deviation 1.

    Source: Xiao, Rasul, Vollgraf 2017, Fashion-MNIST, arXiv 1708.07747; 60,000 and 10,000 images of ten classes.
    """
    pixels = _idx(find(f"{part}-images-idx3-ubyte.gz"), header=16, count=count * 28 * 28)
    classes = _idx(find(f"{part}-labels-idx1-ubyte.gz"), header=8, count=count)
    images = functional.pad(pixels.reshape(-1, 1, 28, 28).float() / 255, (2, 2, 2, 2))
    return (functional.avg_pool2d(images, 2) - 0.22) / 0.29, classes.long()


def _idx(path: Path, header: int, count: int) -> Tensor:
    """Read so many bytes after the header, without decompressing the rest."""
    with gzip.open(path) as file:
        file.read(header)
        content = file.read(count)
    if len(content) < count:
        raise TaskError(f"{path}: has {len(content)} bytes of data instead of {count} or more")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def devils_dictionary() -> str:
    """Read The Devil's Dictionary by Ambrose Bierce (1911), in the public domain: 380,000 characters."""
    with gzip.open(find(TEXT)) as file:  # the format dictzip is gzip with an index
        text = file.read().decode("ascii", errors="replace")
    # The head is the notice of the edition.
    return text[text.index("_The Devil's Dictionary_ was begun") :]


def diabetes() -> tuple[Tensor, Tensor]:
    """Load the diabetes data of Efron et al. 2004: 442 patients, ten inputs and a target, each with mean 0 and std 1.

    They come from scikit-learn, or, where that is missing, from the file that `benchmarks/evidence.py data` writes.
    """
    path = Path(os.environ.get(DATA, "")) / DIABETES
    if path.is_file():
        table = torch.tensor([[float(x) for x in line.split(",")] for line in path.read_text().splitlines()])
    else:
        inputs, target = optional("sklearn.datasets").load_diabetes(return_X_y=True)
        table = torch.cat([torch.from_numpy(inputs), torch.from_numpy(target)[:, None]], 1).float()
    table = (table - table.mean(0)) / table.std(0)
    return table[:, :-1], table[:, -1:]


def cifar100_folder() -> Path:
    """Return the folder ``cifar-100-python`` of CIFAR-100's Python version, in the folder of the user.

    Raises:
        TaskError: it does not exist.
    """
    folder = Path(os.environ.get(DATA, "")).expanduser() / "cifar-100-python"
    if not (folder / "train").is_file():
        raise TaskError(
            f"CIFAR-100 was not found at {folder}: unpack cifar-100-python.tar.gz from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html and set {DATA} to the folder that contains cifar-100-python"
        )
    return folder
