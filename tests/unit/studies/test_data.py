"""Data sets are read as they lie on disk, and what is missing says how to get it."""

import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from pycoherence.studies import data, download

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (12, 28, 28), dtype=np.uint8)
CLASSES = np.arange(12, dtype=np.uint8) % 10


def idx(values):
    """An array as MNIST stores it."""
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def mnist_files():
    arrays = (PIXELS, CLASSES, PIXELS[:5], CLASSES[:5])
    return {name: idx(a) for name, a in zip(download.MNIST_FILES, arrays, strict=True)}


def cifar_files():
    files = {}
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        pixels = np.full((4, 3072), i, np.uint8)
        pixels[:, 1024:2048] = 100  # the second channel
        files[name] = pickle.dumps({"data": pixels, "labels": [i, 1, 2, 9]}, protocol=2)
    return files


def put(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def standardized(found):
    assert found.images.std().item() == pytest.approx(1, abs=0.01)
    assert found.images.mean(dim=0).abs().max() < 1e-5


def test_digits():
    found = data.load()
    assert found.images.shape == (1347, 1, 8, 8)
    assert found.test_images.shape == (450, 1, 8, 8)
    assert found.classes == 10
    assert found.pristine.all()
    standardized(found)
    assert data.load().digest() == found.digest()


def test_data_with_other_labels():
    found = data.load()
    wrong = found.labelled((found.truth + 1) % 10)
    assert not wrong.pristine.any()
    assert wrong.digest() != found.digest()
    few = wrong.first(7)
    assert (len(few.images), len(few.labels), len(few.truth)) == (7, 7, 7)
    assert len(few.test_labels) == 450


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(packed, tmp_path):
    files = mnist_files()
    if packed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    put(tmp_path / "MNIST/raw", files)
    found = data.load("mnist", tmp_path)
    assert found.images.shape == (12, 1, 28, 28)
    assert found.labels.tolist() == CLASSES.tolist()
    assert len(found.test_labels) == 5
    pixels = torch.tensor(PIXELS, dtype=torch.float32)
    centred = pixels - pixels.mean(dim=0)
    torch.testing.assert_close(found.images[:, 0], centred / centred.std())
    torch.testing.assert_close(found.test_images, found.images[:5])  # with the same mean


def test_cifar10(tmp_path):
    put(tmp_path / "cifar-10-batches-py", cifar_files())
    found = data.load("cifar10", tmp_path)
    assert found.images.shape == (20, 3, 32, 32)
    assert found.labels.tolist() == [each for i in range(5) for each in (i, 1, 2, 9)]
    assert found.test_labels.tolist() == [5, 1, 2, 9]
    assert found.images[:, 1].abs().max() < 1e-4  # the channel that is the same everywhere
    assert (found.test_images[:, 0] > found.images[:4, 0].max()).all()


class Evil:
    def __reduce__(self):
        return exec, ("raise AssertionError('it ran')",)


def test_a_pickle_runs_nothing(tmp_path):
    put(tmp_path / "cifar-10-batches-py", {"data_batch_1": pickle.dumps(Evil())})
    with pytest.raises(ValueError, match="expected arrays alone"):
        data.load("cifar10", tmp_path)


def test_folder(tmp_path):
    for part, count in (("train", 9), ("test", 2)):
        (tmp_path / part).mkdir()
        for i, name in enumerate(("cat", "dog")):
            np.save(tmp_path / part / f"{name}.npy", np.full((count, 4, 6), float(i)))
    found = data.load(str(tmp_path))
    assert found.images.shape == (18, 1, 4, 6)
    assert found.labels[:9].unique().tolist() == [0, 1]  # shuffled
    assert torch.equal(found.images[:, 0, 0, 0] > 0, found.labels == 1)
    assert (found.name, found.classes) == (tmp_path.name, 2)
    (tmp_path / "test/dog.npy").unlink()
    with pytest.raises(ValueError, match=r"got \['cat', 'dog'\] and \['cat'\]"):
        data.load(str(tmp_path))


GOOD = np.zeros((2, 3, 4, 4), np.uint8)
MISTAKES = {
    "empty": ("test", GOOD[:0], r"expected images .*test/dog.npy, got uint8 \[0, 3, 4, 4\]"),
    "flat": ("train", GOOD[:, 0, 0], r"expected images .*train/dog.npy, got uint8 \[2, 4\]"),
    "text": ("train", np.full((2, 4, 4), "x"), r"expected images .*train/dog.npy, got <U1"),
    "sizes": ("train", GOOD[..., 1:], r"of one size in .*, got \[3, 4, 3\], \[3, 4, 4\]"),
    "test size": ("test", GOOD[:, 0], r"of one size in .*, got \[3, 4, 4\], \[4, 4\]"),
    "nan": ("test", np.full((2, 3, 4, 4), np.nan), "finite numbers in .*test/dog.npy, got nan"),
    "same": ("train", GOOD, "images that differ in .*, got a spread of 0"),
}


@pytest.mark.parametrize(("part", "array", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_folder(part, array, message, tmp_path):
    for each in ("train", "test"):
        (tmp_path / each).mkdir()
        for name in ("cat", "dog"):
            np.save(tmp_path / each / f"{name}.npy", GOOD)
    np.save(tmp_path / part / "dog.npy", array)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path))


def test_a_folder_of_other_files(tmp_path):
    for part in ("train", "test"):
        put(tmp_path / part, {"cat.npy": b"meow", "dog.npy": b""})
    with pytest.raises(ValueError, match=r"as numpy.save writes it in .*train/cat.npy: "):
        data.load(str(tmp_path))
    for part in ("train", "test"):
        (tmp_path / part / "dog.npy").unlink()
    with pytest.raises(ValueError, match=r"two at least, got \['cat'\] and \['cat'\]"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_data_says_how_to_get_it(name, tmp_path):
    with pytest.raises(ValueError, match=f"expected {name} in .* add --download"):
        data.load(name, tmp_path)


def test_unknown_data_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="expected digits, mnist, cifar10 or a folder"):
        data.load("no such thing")
    put(tmp_path / "MNIST/raw", {name: part[:-1] for name, part in mnist_files().items()})
    with pytest.raises(ValueError, match="expected a whole file of MNIST"):
        data.load("mnist", tmp_path)


BROKEN = {
    "empty": b"",
    "short": b"\0\0\x08",
    "other": b"no MNIST",
    "cut": gzip.compress(b"x" * 99)[:-9],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_broken_files_of_mnist(content, ending, tmp_path):
    put(tmp_path / "MNIST/raw", {f"{name}{ending}": content for name in download.MNIST_FILES})
    with pytest.raises(ValueError, match="expected a whole file of MNIST"):
        data.load("mnist", tmp_path)


def md5(content):
    return hashlib.md5(content).hexdigest()


def test_download_of_mnist(tmp_path, monkeypatch, capsys):
    files = {f"{name}.gz": gzip.compress(part) for name, part in mnist_files().items()}
    put(tmp_path / "there", files)
    monkeypatch.setattr(download, "MNIST_URL", f"{(tmp_path / 'there').as_uri()}/")
    with pytest.raises(ValueError, match="expected the MD5"):
        data.load("mnist", tmp_path / "here", download=True)
    for name, content in files.items():
        monkeypatch.setitem(download.MNIST_FILES, name.removesuffix(".gz"), md5(content))
    assert len(data.load("mnist", tmp_path / "here", download=True).labels) == 12
    assert capsys.readouterr().out.count("fetching") == 5
    data.load("mnist", tmp_path / "here", download=True)  # all is there
    assert not capsys.readouterr().out


def test_download_of_cifar10(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    archive = tmp_path / "there" / download.CIFAR_FILE
    with tarfile.open(archive, "w:gz") as packed:
        for name, content in cifar_files().items():
            about = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            about.size = len(content)
            packed.addfile(about, io.BytesIO(content))
    monkeypatch.setattr(download, "CIFAR_URL", f"{archive.parent.as_uri()}/")
    monkeypatch.setattr(download, "CIFAR_MD5", md5(archive.read_bytes()))
    assert len(data.load("cifar10", tmp_path / "here", download=True).labels) == 20


def test_no_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MNIST_URL", f"{tmp_path.as_uri()}/")
    with pytest.raises(ValueError, match=r"expected file:.*by hand"):
        data.load("mnist", tmp_path, download=True)
