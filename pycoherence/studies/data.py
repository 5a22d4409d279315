"""The data sets of the studies: digits from scikit-learn, or what lies in a local folder."""

import gzip
import hashlib
import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycoherence.studies.download import CIFAR_FOLDER, MNIST_FILES, MNIST_FOLDER, fetch

Images = NDArray[np.uint8] | NDArray[np.float64]
Split = tuple[Images, NDArray[np.int64]]
"""Images `[n, C, H, W]` and their classes `[n]`."""


@dataclass(frozen=True)
class Data:
    """A training set, whose labels may be wrong, and a test set.

    Attributes:
        images: `[n, C, H, W]`, standardized.
        labels: Labels to train on, `[n]`.
        truth: True labels, `[n]`.
        test_images: `[m, C, H, W]`.
        test_labels: `[m]`.
        classes: Their number.
    """

    name: str
    images: Tensor
    labels: Tensor
    truth: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    def __str__(self) -> str:
        """A summary in a line."""
        return (
            f"{self.name}: {len(self.labels)} images to train on and {len(self.test_labels)} to "
            f"test on, each {list(self.images.shape[1:])}, in {self.classes} classes"
        )

    @property
    def pristine(self) -> Tensor:
        """Which training labels are the true ones, `[n]`."""
        return self.labels == self.truth

    def labelled(self, labels: Tensor) -> "Data":
        """The same with other training labels."""
        return replace(self, labels=labels)

    def first(self, n: int) -> "Data":
        """The same with the first n training examples only."""
        return replace(self, images=self.images[:n], labels=self.labels[:n], truth=self.truth[:n])

    def take(self, chosen: Tensor) -> "Data":
        """The same with the training examples of these indices only."""
        images, labels, truth = (x[chosen] for x in (self.images, self.labels, self.truth))
        return replace(self, images=images, labels=labels, truth=truth)

    def to(self, device: str) -> "Data":
        """The same on another device."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def digest(self) -> str:
        """A hash of all that training can see of it."""
        found = hashlib.sha256()
        for tensor in (self.images, self.labels, self.truth, self.test_images, self.test_labels):
            found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


def load(name: str = "digits", root: Path = Path("data"), download: bool = False) -> Data:
    """A data set by its name, or the folder of that name.

    Args:
        name: `digits`; `mnist` or `cifar10`, which lie in `root` as torchvision puts them there; or
            a folder of files `train/CLASS.npy` and `test/CLASS.npy`, each with the images of one
            class: `[n, H, W]` or `[n, C, H, W]`.
        root: Folder of data sets.
        download: Fetch what is missing.

    Raises:
        ValueError: The data set is missing (then the message has the command that gets it), or not
            what was expected.
    """
    readers = {"mnist": _mnist, "cifar10": _cifar10}
    if name == "digits":
        return _standardize(name, *_digits())
    if name in readers:
        if download:
            fetch(name, root)
        try:
            return _standardize(name, *readers[name](root))
        except FileNotFoundError as error:
            raise ValueError(
                f"expected {name} in {root}, as torchvision puts it there, but {error.filename} is "
                "missing; add --download to fetch it, or name another folder with --root"
            ) from None
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"expected digits, {', '.join(readers)} or a folder as data, got {name!r}")
    return _standardize(folder.name, *_folder(folder))


def _digits() -> tuple[Split, Split]:
    """A quarter is the test set, every digit in proportion; always the same quarter."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    chosen = train_test_split(np.arange(len(y)), test_size=0.25, stratify=y, random_state=0)
    train, test = ((x[part].reshape(-1, 1, 8, 8), y[part]) for part in chosen)
    return train, test


def _mnist(root: Path) -> tuple[Split, Split]:
    x_train, y_train, x_test, y_test = (_idx(root / MNIST_FOLDER / name) for name in MNIST_FILES)
    return (x_train[:, None], y_train.astype(np.int64)), (x_test[:, None], y_test.astype(np.int64))


def _idx(path: Path) -> NDArray[np.uint8]:
    """The array of a file of MNIST, packed or not."""
    packed = path.with_name(f"{path.name}.gz")
    is_packed = not path.exists() and packed.exists()
    try:
        content = gzip.decompress(packed.read_bytes()) if is_packed else path.read_bytes()
    except (EOFError, gzip.BadGzipFile):
        content = b""
    dimensions = content[3] if len(content) > 3 and content.startswith(b"\0\0\x08") else 0
    sizes = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
    values = np.frombuffer(content[4 + 4 * dimensions :], np.uint8)
    if not dimensions or len(values) != math.prod(sizes):
        raise ValueError(f"expected a whole file of MNIST, got {path}; delete it and fetch it anew")
    return values.reshape(sizes)


def _cifar10(root: Path) -> tuple[Split, Split]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    parts = []
    for name in names:
        with (root / CIFAR_FOLDER / name).open("rb") as file:
            part = _Arrays(file, encoding="latin1").load()
        images = np.asarray(part["data"], np.uint8).reshape(-1, 3, 32, 32)
        parts.append((images, np.asarray(part["labels"], np.int64)))
    x, y = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return (x, y), parts[-1]


class _Arrays(pickle.Unpickler):
    """Reads arrays and refuses everything else, which a pickle could run."""

    def __init__(self, file: IO[bytes], *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """See `pickle.Unpickler.find_class`."""
        needed = {"_reconstruct", "ndarray", "dtype", "encode"}
        if module_name.partition(".")[0] in {"numpy", "_codecs"} and global_name in needed:
            return super().find_class(module_name, global_name)
        raise ValueError(f"expected arrays alone in CIFAR-10, got {module_name}.{global_name}")


def _folder(folder: Path) -> tuple[Split, Split]:
    names = [sorted(path.stem for path in (folder / part).glob("*.npy")) for part in _PARTS]
    if len(names[0]) < 2 or names[0] != names[1]:
        raise ValueError(
            f"expected files train/CLASS.npy and test/CLASS.npy of the same classes in {folder}, "
            f"two at least, got {names[0]} and {names[1]}"
        )
    arrays = [[_array(folder / part / f"{name}.npy") for name in names[0]] for part in _PARTS]
    shapes = {array.shape[1:] for part in arrays for array in part}
    if len(shapes) > 1:
        found = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(f"expected images of one size in {folder}, got {found}")
    train, test = map(_classes, arrays)
    return train, test


_PARTS = ("train", "test")


def _array(path: Path) -> NDArray[Any]:
    """The images of one class."""
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected an array as numpy.save writes it in {path}: {error}") from None
    if found.dtype.kind not in "buif" or found.ndim not in (3, 4) or not found.size:
        raise ValueError(
            f"expected images [n, H, W] or [n, C, H, W] in {path}, got {found.dtype} "
            f"{list(found.shape)}"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"expected finite numbers in {path}, got nan or infinity")
    return found


def _classes(arrays: list[NDArray[Any]]) -> Split:
    """One class after the other, shuffled once, so that the first examples are of all classes."""
    x = np.concatenate(arrays)
    y = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
    order = np.random.default_rng(0).permutation(len(y))
    return (x if x.ndim == 4 else x[:, None])[order], y[order]


def _standardize(name: str, train: Split, test: Split) -> Data:
    """Each pixel less its mean over the training set, all over one standard deviation."""
    x, x_test = (torch.tensor(part[0], dtype=torch.float32) for part in (train, test))
    y, y_test = (torch.tensor(part[1], dtype=torch.int64) for part in (train, test))
    # Added up in float64, so that the number of cores does not show.
    mean = x.mean(dim=0, dtype=torch.float64).float()
    norm = torch.linalg.vector_norm(x - mean, dtype=torch.float64)
    std = (norm / max(1, x.numel() - 1) ** 0.5).float()
    if not 0 < std < math.inf:
        raise ValueError(f"expected images that differ in {name}, got a spread of {std.item():g}")
    return Data(name, (x - mean) / std, y, y, (x_test - mean) / std, y_test, int(y.max()) + 1)
