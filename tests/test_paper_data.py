"""The readers of examples/paper on small files in the exact formats that are published."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from paper import data, endless

MNIST = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """As http://yann.lecun.com/exdb/mnist/ describes it: magic number, dimensions, bytes."""
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, train: int = 6, test: int = 3, zipped: bool = True) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = []
    for name in MNIST:
        n = train if name.startswith("train") else test
        shape, high = ((n, 28, 28), 256) if "images" in name else ((n,), 10)
        arrays.append(generator.integers(high, size=shape, dtype=np.uint8))
        content = idx(arrays[-1])
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    return arrays


class Python2Pickler(pickle._Pickler):
    """Writes as the authors' Python 2 did: strings and bytes are one type, without an encoding."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, obj: str | bytes) -> None:
        content = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj: object, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")  # where NumPy 1 kept it
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[type] = dispatch[type(pickle.dumps)] = dispatch[type(data.load)] = save_global


def write_cifar(folder: Path, classes: int, samples: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(classes)
    inner, train = ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]) if classes == 10 else (
        "cifar-100-python", ["train"],
    )  # fmt: skip
    (folder / inner).mkdir(parents=True)
    written = {}
    for name in [*train, "test_batch" if classes == 10 else "test"]:
        rows = generator.integers(256, size=(samples, 3072), dtype=np.uint8)
        labels = generator.integers(classes, size=samples).tolist()
        names = [f"image_{i}.png" for i in range(samples)]
        content = {"data": rows, "filenames": names, "batch_label": name}
        content |= {"labels": labels} if classes == 10 else {"fine_labels": labels, "coarse_labels": [0] * samples}
        with (folder / inner / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(content)
        written[name] = rows, labels
    return written


def test_digits():
    digits = data.load("digits")
    assert [tuple(part.shape) for part in digits] == [(1500, 1, 8, 8), (1500,), (297, 1, 8, 8), (297,)]
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    assert digits.train_labels.unique().tolist() == list(range(10))


# ---- the endless sets of digits --------------------------------------------------------------------------------------


def squares(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(count, 1, 8, 8)
    images[:, :, 3:5, 3:5] = 1
    return images, torch.arange(count) % 10


def test_one_label_of_ten_is_wrong():
    images, labels = squares()
    images += labels.view(-1, 1, 1, 1)  # the brightest pixel tells the label
    drawn, given = endless.noisy(images, labels, 4000, seed=0)
    right = (drawn.amax((1, 2, 3)) - 1).round().long()
    wrong = right != given
    assert float(wrong.float().mean()) == pytest.approx(0.1, abs=0.015)
    assert given[wrong].unique().tolist() == list(range(10))
    assert torch.equal(*(endless.noisy(images, labels, 50, seed=0, noise=0.0)[1] for _ in range(2)))


def test_no_two_images_are_alike():
    drawn, _ = endless.noisy(*squares(count=3), 500, seed=0)
    assert len(drawn.flatten(1).unique(dim=0)) == 500


def test_parity_of_the_sum():
    images, labels = squares(count=10)
    images += labels.view(-1, 1, 1, 1)
    drawn, given = endless.parity(images, labels, 300, seed=0)
    assert drawn.shape == (300, 1, 8, 16)
    digits = [(half.amax((1, 2, 3)) - 1).round().long() for half in drawn.split(8, dim=3)]
    assert torch.equal(given, (digits[0] + digits[1]) % 2)


def test_turning_and_shifting(monkeypatch):
    images, _ = squares(count=500)
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(endless, "DEGREES", 0.0)
    monkeypatch.setattr(endless, "PIXELS", 0.0)
    torch.testing.assert_close(endless.moved(images, generator), images, rtol=0, atol=1e-5)
    monkeypatch.setattr(endless, "PIXELS", 1.0)
    moved = endless.moved(images, generator)[:, 0]
    torch.testing.assert_close(moved.sum((1, 2)), images.sum((1, 2, 3)), rtol=0, atol=1e-4)
    centre = (moved.sum(1) * torch.arange(8)).sum(1) / 4 - 3.5
    assert float(centre.min()) == pytest.approx(-1, abs=0.05) and float(centre.max()) == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(endless, "PIXELS", 0.0)
    monkeypatch.setattr(endless, "DEGREES", 15.0)
    bar = torch.zeros(500, 1, 8, 8)
    bar[:, :, 3:5] = 1
    ends = endless.moved(bar, generator)[:, 0, :, 6]  # 2.5 pixels from the middle
    height = (ends * torch.arange(8)).sum(1) / ends.sum(1) - 3.5
    assert float(height.max()) == pytest.approx(2.5 * np.tan(np.radians(15)), abs=0.1)
    assert float(height.min()) == pytest.approx(-2.5 * np.tan(np.radians(15)), abs=0.1)


@pytest.mark.parametrize(("name", "shape"), [("digits-noisy", (1, 8, 8)), ("digits-parity", (1, 8, 16))])
def test_endless_sets_by_name(name, shape):
    read = data.load(name)
    assert read.train_images.shape == (endless.IMAGES, *shape) and read.test_images.shape[1:] == shape
    assert read.train_labels.unique().tolist() == list(range(data.classes_of(name)))
    assert float(read.train_images.min()) >= 0 and float(read.train_images.max()) <= 1 + 1e-6


# ---- files that are published ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist(tmp_path, zipped):
    train_images, train_labels, test_images, test_labels = write_mnist(tmp_path, zipped=zipped)
    read = data.load("mnist", tmp_path)
    for found, images in ((read.train_images, train_images), (read.test_images, test_images)):
        assert found.shape == (len(images), 1, 28, 28) and found.dtype == torch.float32
        np.testing.assert_array_equal((found * 255).round().numpy()[:, 0], images)
    assert read.train_labels.tolist() == train_labels.tolist() and read.test_labels.tolist() == test_labels.tolist()
    assert read.train_labels.dtype == torch.int64


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes):
    written = write_cifar(tmp_path, classes)
    train = data.load(f"cifar{classes}", tmp_path)
    inside = data.load(f"cifar{classes}", next(tmp_path.iterdir()))  # the folder in the archive is as good
    torch.testing.assert_close(train, inside, rtol=0, atol=0)

    *parts, (test_rows, test_labels) = written.values()
    pixels = np.concatenate([rows for rows, _ in parts]).reshape(-1, 3, 32, 32) / 255
    mean, deviation = pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True, ddof=1)
    expected = (pixels - mean) / deviation
    np.testing.assert_allclose(train.train_images.numpy(), expected, rtol=0, atol=1e-5)
    expected = (test_rows.reshape(-1, 3, 32, 32) / 255 - mean) / deviation
    np.testing.assert_allclose(train.test_images.numpy(), expected, rtol=0, atol=1e-5)
    assert train.train_labels.tolist() == [label for _, labels in parts for label in labels]
    assert train.test_labels.tolist() == test_labels
    red, row, column = 0, 3, 5  # a row of the file is all red pixels, line by line, then green, then blue
    value = test_rows[0, red * 1024 + row * 32 + column] / 255
    assert float(train.test_images[0, red, row, column]) == pytest.approx(
        float((value - mean[0, 0, 0, 0]) / deviation[0, 0, 0, 0]), abs=1e-5
    )


def test_pickles_of_python_3_are_read_too(tmp_path):
    write_cifar(tmp_path, 100)
    path = tmp_path / "cifar-100-python" / "train"
    content = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 2]}
    path.write_bytes(pickle.dumps(content))
    assert data.read_cifar(path, "fine_labels")[1].tolist() == [1, 2]


def test_a_pickle_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "train").write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir"):
        data.read_cifar(tmp_path / "train", "fine_labels")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "files", "page"),
    [
        ("mnist", MNIST, "http://yann.lecun.com/exdb/mnist/"),
        ("cifar10", ("data_batch_1", "data_batch_5", "test_batch"), "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("cifar100", ("train", "test"), "https://www.cs.toronto.edu/~kriz/cifar.html"),
    ],
)
def test_missing_files_are_named_with_their_source_and_place(tmp_path, name, files, page):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path)
    for expected in (*files, page, str(tmp_path)):
        assert expected in str(caught.value)


def test_only_what_is_missing_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / f"{MNIST[2]}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {MNIST[2]} "):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (b"<html>", "no IDX file"),
        (struct.pack(">HBBI", 0, 13, 1, 2) + bytes(8), "no IDX file"),  # floats
        (struct.pack(">HBBI", 0, 8, 1, 3) + bytes(2), "should hold .* but holds 2"),
        (struct.pack(">HBB", 0, 8, 3) + bytes(4), "no IDX file"),  # ends among the dimensions
    ],
)
def test_damaged_idx(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / "file")


def test_images_and_labels_of_different_number(tmp_path):
    write_mnist(tmp_path, train=6, zipped=False)
    (tmp_path / MNIST[1]).write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match="6 training images and 5 labels"):
        data.load("mnist", tmp_path)


def test_damaged_cifar(tmp_path):
    write_cifar(tmp_path, 100)
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train is no file of CIFAR's Python version"):
        data.load("cifar100", tmp_path)


def test_no_folder_and_no_such_data():
    with pytest.raises(ValueError, match="--data-dir"):
        data.load("cifar10")
    with pytest.raises(ValueError, match="choose from digits, digits-noisy, digits-parity, mnist, cifar10, cifar100"):
        data.load("imagenet", ".")
