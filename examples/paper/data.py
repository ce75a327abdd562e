"""Data sets as tensors, read from the files that their authors publish."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from . import endless

OF_DIGITS = {"digits-noisy": endless.noisy, "digits-parity": endless.parity}
NAMES = ("digits", *OF_DIGITS, "mnist", "cifar10", "cifar100")
_MNIST_PAGE = "http://yann.lecun.com/exdb/mnist/"
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def classes_of(name: str) -> int:
    """Return how many classes a data set has."""
    return {"digits-parity": 2, "cifar100": 100}.get(name, 10)


class Data(NamedTuple):
    """Return images ``(N, channels, height, width)`` in float32, labels ``(N,)`` in int64, of training and test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(name: str, folder: str | Path | None = None) -> Data:
    """Return training and test set of one of ``NAMES``; all but those of digits are read from files in ``folder``.

    Grey pixels are scaled to [0, 1]. Colours are standardised with each channel's mean and standard deviation over the
    training set. Only the larger sets of digits are augmented. Raises ``ValueError`` without a folder, for an unknown
    name and for a damaged file, ``FileNotFoundError`` where files are missing; both say what to do.
    """
    if name == "digits":
        return _digits()
    if name in OF_DIGITS:
        return _endless(name)
    if name not in NAMES:
        raise ValueError(f"There is no data set {name!r}: choose from {', '.join(NAMES)}.")
    if folder is None:
        raise ValueError(f"{name} is read from files, but no folder was given: pass --data-dir FOLDER.")
    return _mnist(Path(folder)) if name == "mnist" else _cifar(Path(folder), int(name.removeprefix("cifar")))


def _digits() -> Data:
    """Return the 1797 scans of 8x8 pixels that come with scikit-learn, in the same 1500 and 297 always."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = (
        torch.tensor(part)
        for part in train_test_split(images / 16, labels, test_size=297, stratify=labels, random_state=0)
    )
    return Data(x_train.float().view(-1, 1, 8, 8), y_train, x_test.float().view(-1, 1, 8, 8), y_test)


def _endless(name: str) -> Data:
    """Training and test set made of the digits of either; the labels of the test set are right."""
    digits = _digits()
    train = OF_DIGITS[name](digits.train_images, digits.train_labels, endless.IMAGES, seed=0)
    exact = {"noise": 0.0} if name == "digits-noisy" else {}
    return Data(*train, *OF_DIGITS[name](digits.test_images, digits.test_labels, 2000, seed=1, **exact))


def _mnist(folder: Path) -> Data:
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    paths = {name: next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise FileNotFoundError(
            f"MNIST is incomplete in {folder}: there is no {', '.join(missing)} (.gz or unpacked). "
            f"Get the four files from {_MNIST_PAGE} and put them there."
        )
    parts = [torch.from_numpy(read_idx(path)) for path in paths.values() if path is not None]
    for kind, images, labels in (("training", *parts[:2]), ("test", *parts[2:])):
        if len(images) != len(labels):
            raise ValueError(
                f"MNIST in {folder} has {len(images)} {kind} images and {len(labels)} labels: get it anew."
            )
    return Data(*(part.unsqueeze(1).float() / 255 if part.ndim == 3 else part.long() for part in parts))


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the array of unsigned bytes in an IDX file, gzipped or not.

    Two zero bytes, the type of the entries (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit integer, then the entries. Raises ``ValueError`` for anything else.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08" or len(content) < 4 or len(content) < 4 + 4 * content[3]:
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes, it begins with {content[:4].hex(' ')}: get it anew."
        )
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    start = 4 + 4 * len(shape)
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} should hold {shape} bytes, but holds {len(content) - start}: get it anew.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _cifar(folder: Path, classes: int) -> Data:
    if classes == 10:
        inner, train, test, key = (
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)],
            "test_batch",
            "labels",
        )
    else:
        inner, train, test, key = "cifar-100-python", ["train"], "test", "fine_labels"
    place = folder / inner if (folder / inner).is_dir() else folder
    if missing := [name for name in [*train, test] if not (place / name).is_file()]:
        raise FileNotFoundError(
            f"CIFAR-{classes} is incomplete in {place}: there is no {', '.join(missing)}. "
            f'Get "CIFAR-{classes} python version" from {_CIFAR_PAGE} and unpack it in {folder}, which makes {inner}/.'
        )
    train_parts, (test_images, test_labels) = [read_cifar(place / n, key) for n in train], read_cifar(place / test, key)
    images = torch.cat([part[0] for part in train_parts])
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    labels = torch.cat([part[1] for part in train_parts])
    return Data((images - mean) / std, labels, (test_images - mean) / std, test_labels)


def read_cifar(path: Path, key: str) -> tuple[Tensor, Tensor]:
    """Return images ``(N, 3, 32, 32)`` in [0, 1] and the labels under ``key`` of a file of CIFAR's Python version.

    A pickled dictionary: ``data`` holds rows of 1024 red, 1024 green and 1024 blue pixels. Raises ``ValueError`` for
    anything else.
    """
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        rows, labels = content[b"data"], content[key.encode()]
        images = torch.from_numpy(rows.reshape(-1, 3, 32, 32)).float() / 255
    except Exception as error:  # of whatever damage
        raise ValueError(f"{path} is no file of CIFAR's Python version ({error}): get it anew.") from error
    if len(images) != len(labels):
        raise ValueError(f"{path} has {len(images)} images and {len(labels)} labels: get it anew.")
    return images, torch.tensor(labels)


class _Unpickler(pickle.Unpickler):
    """Builds NumPy arrays and nothing else: a pickle from the internet could run any code."""

    _RECONSTRUCT = np.zeros(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        # numpy.core is where NumPy 1 kept what NumPy 2 keeps in numpy._core
        allowed = {
            "numpy.core.multiarray._reconstruct": self._RECONSTRUCT,
            "numpy._core.multiarray._reconstruct": self._RECONSTRUCT,
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[f"{module}.{name}"]
