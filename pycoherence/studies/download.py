"""Fetch MNIST and CIFAR-10 to where torchvision would put them."""

import hashlib
import shutil
import tarfile
import urllib.request
from pathlib import Path

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FOLDER = "MNIST/raw"
MNIST_FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""Names and the MD5 of what they are packed in."""

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_FILE = "cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"


def fetch(name: str, root: Path) -> None:
    """Fetch what of `mnist` or `cifar10` is not there yet.

    Raises:
        ValueError: It cannot be reached, or what comes is not what it should be.
    """
    if name == "mnist":
        folder = root / MNIST_FOLDER
        for file, md5 in MNIST_FILES.items():
            if not (folder / file).exists():
                _get(f"{MNIST_URL}{file}.gz", folder / f"{file}.gz", md5)
    elif not (root / CIFAR_FOLDER / "test_batch").exists():
        archive = root / CIFAR_FILE
        _get(CIFAR_URL + CIFAR_FILE, archive, CIFAR_MD5)
        with tarfile.open(archive) as packed:
            packed.extractall(root, filter="data")


def _get(url: str, path: Path, md5: str) -> None:
    if path.exists() and _md5(path) == md5:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    print(f"fetching {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, part.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except OSError as error:
        raise ValueError(
            f"expected {url} to answer, got {error}; put it to {path} by hand"
        ) from None
    if (found := _md5(part)) != md5:
        raise ValueError(f"expected the MD5 {md5} of {url}, got {found}; see {part}")
    part.replace(path)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
