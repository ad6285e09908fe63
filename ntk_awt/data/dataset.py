"""Images and labels: where they come from, the checks on the files, and the seeded splits.

Nothing is downloaded, except through `hub:NAME`. A data set of your own: an `.npz` file, or a
function in `DATASETS`.
"""

import functools
import gzip
import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntk_awt.app.config import DataConfig
from ntk_awt.errors import InputError, check_images, check_labels, check_number, choose
from ntk_awt.types import Box

_AGAIN = "get the file again, or fix how it was written"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of one run, split and scaled.

    Args:
        name: the name in the settings.
        x_train, x_validation, x_test: float32 images [n, height, width, channels], or flat features
            [n, d]; pixels in `bounds`.
        y_train, y_validation, y_test: int32 labels [n] in 0 … num_classes − 1.
        num_classes: how many classes there are.
        bounds: lowest and highest value that a pixel (also of a perturbed image) may have, numbers
            or arrays by channel, see `types.Box`.

    Raises:
        InputError: an array has another dtype, shape or range than that.

    Example:
        >>> x, y = np.zeros((2, 8, 8, 1), np.float32), np.array([0, 1], np.int32)
        >>> data = Dataset("zeros", x, y, x, y, x, y, num_classes=2)
        >>> data.image_shape, data.digest
        ((8, 8, 1), '1961bd7d7864')
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    bounds: Box = (0.0, 1.0)

    def __post_init__(self):
        for part, x, y in self._parts():
            x_name, y_name = f"{self.name}: x_{part}", f"{self.name}: y_{part}"
            for what, array, dtype in ((x_name, x, "float32"), (y_name, y, "int32")):
                if not isinstance(array, np.ndarray) or array.dtype != dtype:
                    got = str(getattr(array, "dtype", type(array).__name__))
                    raise InputError(what, expected=f"a NumPy array of {dtype}", got=got)
            check_images(x_name, x, self.bounds)
            check_labels(y_name, y, len(x), self.num_classes)
            if x.shape[1:] != self.image_shape:
                shape = f"images of shape {self.image_shape}, as in x_train"
                raise InputError(x_name, expected=shape, got=f"shape {x.shape[1:]}")

    def _parts(self) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
        yield "train", self.x_train, self.y_train
        yield "validation", self.x_validation, self.y_validation
        yield "test", self.x_test, self.y_test

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image: (height, width, channels), or (d,) for flat features."""
        return self.x_train.shape[1:]

    @functools.cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that depend on the content of all arrays only."""
        content = hashlib.sha256()
        for _, x, y in self._parts():
            for array in (x, y):
                content.update(str(array.shape).encode())
                # Little-endian, so that the digest is the same on every machine.
                fixed = array.astype(array.dtype.newbyteorder("<"), copy=False)
                content.update(np.ascontiguousarray(fixed).data)
        return content.hexdigest()[:12]


class Raw(NamedTuple):
    """What a loader returns, before splitting and scaling.

    Attributes:
        x_train, x_test: images [n, height, width] or [n, height, width, channels], or features
            [n, d]; uint8 in 0 … 255, or floats in [0, 1].
        y_train, y_test: integer labels [n] in 0 … num_classes − 1.
        num_classes: how many classes there are.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int


def load(config: DataConfig, seed: int) -> Dataset:
    """Load a data set, split validation images off the training images, scale pixels to [0, 1].

    One random order of the training images, drawn with the seed, gives both parts: validation is
    its end, training its beginning. So the validation images do not depend on `train_size`, and a
    smaller `train_size` is the beginning of a larger one. Every beginning of the training and of
    the validation images has all classes in proportion. The whole test part keeps its file's order.

    Args:
        config: name, folder, sizes and validation fraction.
        seed: seed of the draws, ≥ 0.

    Returns:
        The three parts: float32 images [n, height, width, channels] (or [n, d]) with pixels in
        [0, 1], and int32 labels [n].

    Raises:
        InputError: an unknown name, a missing or bad file (named), a size above what there is, or
            a class without training images.

    Example:
        >>> data = load(DataConfig("digits", train_size=1000), seed=0)
        >>> data.x_train.shape, data.x_validation.shape, data.x_test.shape
        ((1000, 8, 8, 1), (140, 8, 8, 1), (400, 8, 8, 1))
    """
    check_number("seed", seed, low=0)
    name = config.name
    if name.startswith("hub:"):
        raw = _hub(config)
    elif name.endswith(".npz"):
        raw = _npz(config)
    else:
        choose("data", name, [*DATASETS, "FILE.npz", "hub:NAME"])
        raw = DATASETS[name](config, seed)

    rng = np.random.default_rng([seed, 0])
    order = _balanced_order(raw.y_train, rng)
    n_validation = max(1, round(config.validation_fraction * len(order)))
    n_train = len(order) - n_validation
    train = order[: _size("train_size", config.train_size, n_train)]
    _check_every_class(name, raw.y_train[train], raw.num_classes)
    validation = order[n_train:]
    validation = validation[_balanced_order(raw.y_train[validation], rng)]

    n_test = _size("test_size", config.test_size, len(raw.y_test))
    test = np.arange(n_test)
    if n_test < len(raw.y_test):
        test = _balanced_order(raw.y_test, np.random.default_rng([seed, 1]))[:n_test]

    return Dataset(
        name,
        *_part(raw.x_train, raw.y_train, train),
        *_part(raw.x_train, raw.y_train, validation),
        *_part(raw.x_test, raw.y_test, test),
        num_classes=raw.num_classes,
    )


def _balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random order of the images such that every beginning has all classes in proportion.

    Image k of a class of n images is placed at k/n, so the first ones are one of each class: a
    class is missing only where fewer images are taken than there are classes.
    """
    order = rng.permutation(len(labels))
    _, label, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(label, kind="stable")
    rank = np.empty(len(labels))
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort(rank / counts[label], kind="stable")]


def _size(what: str, wanted: int | None, available: int) -> int:
    size = available if wanted is None else wanted
    if not 1 <= size <= available:
        left = " left after validation" if what == "train_size" else ""
        fix = f"there are {available} images{left}"
        raise InputError(what, expected=f"1 to {available}", got=f"{size}", fix=fix)
    return size


def _check_every_class(name: str, labels: np.ndarray, num_classes: int) -> None:
    if num_classes < 2:
        raise InputError(
            f"data {name}",
            expected="two classes or more",
            got=f"{num_classes}",
            fix="add images of another class",
        )
    present = set(np.unique(labels).tolist())
    if len(present) < num_classes:
        # Of the labels 0 … len(present), one more than there are, at least one is missing.
        missing = next(c for c in range(len(present) + 1) if c not in present)
        raise InputError(
            f"data {name}",
            expected=f"training images of each of the {num_classes} classes",
            got=f"none of class {missing} among {len(labels)}",
            fix="use more training images, or number the labels 0…C−1 without gaps",
        )


def _part(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    x = images[chosen].astype(np.float32)
    if images.dtype == np.uint8:
        x /= 255
    return x[..., None] if x.ndim == 3 else x, labels[chosen].astype(np.int32)


def _check_pair(x_name: str, x: np.ndarray, y_name: str, y: np.ndarray, num_classes: int) -> None:
    """Raise, naming the file (or key), unless the images and labels of one part are as in `Raw`."""
    if x.ndim not in (2, 3, 4) or x.size == 0:
        raise InputError(
            x_name,
            expected="images [n, h, w] or [n, h, w, c], or features [n, d], and at least one",
            got=f"shape {x.shape}",
        )
    if x.dtype != np.uint8:
        check_images(x_name, x)
    check_labels(y_name, y, len(x), num_classes)


def _check_same_shape(x_name: str, x_test: np.ndarray, x_train: np.ndarray) -> None:
    if x_test.shape[1:] != x_train.shape[1:]:
        expected = f"shape {x_train.shape[1:]}, as of the training images"
        raise InputError(x_name, expected=expected, got=f"shape {x_test.shape[1:]}")


def _base(config: DataConfig) -> Path:
    return Path(config.data_dir or os.environ.get("NTK_AWT_DATA") or "data").expanduser()


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the files that is there, plain or gzipped."""
    paths = (folder / (name + end) for name in names for end in ("", ".gz"))
    return next((path for path in paths if os.path.isfile(path)), None)


def _find(config: DataConfig, files: Sequence[Sequence[str]]) -> list[Path]:
    """The path of each file, all in one folder; each is given by the names it may have."""
    base = _base(config)
    folders = [base / config.name, base]
    # mnist and fashion_mnist have the same file names: never take one for the other.
    if base.absolute().name in set(DATASETS) - {config.name}:
        folders.remove(base)
    found = [[_first(folder, names) for names in files] for folder in folders]
    best = max(found, key=lambda paths: len(paths) - paths.count(None))
    if None in best:
        missing = files[best.index(None)][0]
        raise InputError(
            f"data {config.name}",
            expected=f"{missing}[.gz] in {' or '.join(str(folder) for folder in folders)}",
            got="no such file",
            fix="give the folder with --data-dir or the environment variable NTK_AWT_DATA",
        )
    return [path for path in best if path is not None]


def _read(path: Path) -> bytes:
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        expected = "a complete gzip file" if packed else "a readable file"
        raise InputError(str(path), expected=expected, got=str(error), fix=_AGAIN) from None


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array with `ndim` dimensions in an IDX file."""
    data = _read(path)
    start, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    if data[:4] != magic or len(data) < start:
        raise InputError(
            str(path),
            expected=f"an IDX file of bytes with {ndim} dimensions ({magic.hex(' ')}, …)",
            got=f"{data[:4].hex(' ') or 'nothing'}, {len(data)} bytes in all",
            fix=_AGAIN,
        )
    shape = struct.unpack(f">{ndim}I", data[4:start])
    if len(data) - start != math.prod(shape):
        expected = f"{math.prod(shape)} bytes after the header, for shape {shape}"
        raise InputError(str(path), expected=expected, got=f"{len(data) - start}", fix=_AGAIN)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _digits(config: DataConfig, seed: int) -> Raw:
    """scikit-learn's 1,797 images of 8×8 pixels; they have no test part, so 400 are drawn."""
    from sklearn.datasets import load_digits  # costs a second or more

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8) / 16
    order = _balanced_order(labels, np.random.default_rng([seed, 2]))
    test, train = order[:400], order[400:]
    return Raw(images[train], labels[train], images[test], labels[test], num_classes=10)


def _mnist(config: DataConfig, seed: int) -> Raw:
    """The four IDX files of MNIST, or of a data set in its format."""
    stems = [
        f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    paths = _find(config, [(f"{s}-ubyte", f"{s.replace('-idx', '.idx')}-ubyte") for s in stems])
    x_train, y_train, x_test, y_test = map(_read_idx, paths, (3, 1, 3, 1))
    _check_pair(str(paths[0]), x_train, str(paths[1]), y_train, 10)
    _check_pair(str(paths[2]), x_test, str(paths[3]), y_test, 10)
    _check_same_shape(str(paths[2]), x_test, x_train)
    return Raw(x_train, y_train, x_test, y_test, num_classes=10)


def _cifar10(config: DataConfig, seed: int) -> Raw:
    """CIFAR-10's binary version; as many of the five training batches as are there."""
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    test_path = _find(config, [batches, ["test_batch.bin"]])[1]
    train_paths = [path for b in batches if (path := _first(test_path.parent, [b]))]
    parts = [_read_cifar(path) for path in train_paths]
    x_train, y_train = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Raw(x_train, y_train, *_read_cifar(test_path), num_classes=10)


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 32, 32, 3] and labels [n]; a record is a label and the three colour planes."""
    data = np.frombuffer(_read(path), np.uint8)
    if len(data) == 0 or len(data) % 3073:
        expected = "records of 3073 bytes"
        raise InputError(str(path), expected=expected, got=f"{len(data)} bytes", fix=_AGAIN)
    records = data.reshape(-1, 3073)
    check_labels(f"{path}: labels", records[:, 0], len(records), 10)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _npz(config: DataConfig) -> Raw:
    """An archive written with `numpy.savez(file, x_train=…, y_train=…, x_test=…, y_test=…)`."""
    paths = [Path(config.name).expanduser(), _base(config) / config.name]
    path = next((p for p in paths if os.path.isfile(p)), None)
    if path is None:
        folders = f"{paths[0].absolute().parent} or {paths[1].absolute().parent}"
        raise InputError(
            f"data {config.name}",
            expected=f"{paths[0].name} in {folders}",
            got="no such file",
            fix="give the file's whole path, or its folder with --data-dir",
        )
    if not zipfile.is_zipfile(path):
        got = "another kind of file"
        raise InputError(str(path), expected="an archive by numpy.savez", got=got, fix=_AGAIN)
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        # Opened here, because np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            found = ", ".join(archive) or "none"
            arrays = [np.asarray(archive[key]) for key in keys if key in archive]
    except Exception as error:  # a bad archive raises one of many kinds
        expected = "readable arrays of numbers"
        raise InputError(str(path), expected=expected, got=_line(error), fix=_AGAIN) from error
    if len(arrays) < len(keys):
        raise InputError(str(path), expected=f"arrays {', '.join(keys)}", got=found)
    return _checked(str(path), keys, arrays)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _checked(where: str, names: Sequence[str], arrays: Sequence[Any]) -> Raw:
    """The four arrays, checked; there are as many classes as the highest label says."""
    x_train, y_train, x_test, y_test = arrays
    names = [f"{where}: {name}" for name in names]
    _check_pair(names[0], x_train, names[1], y_train, 2**31)
    _check_pair(names[2], x_test, names[3], y_test, 2**31)
    _check_same_shape(names[2], x_test, x_train)
    return Raw(*arrays, num_classes=1 + int(max(y_train.max(), y_test.max())))


def _hub(config: DataConfig) -> Raw:
    """A data set of the Hugging Face hub, or a local folder of Parquet files."""
    where = f"data {config.name}"
    try:
        import datasets
    except ImportError:
        raise InputError(
            where,
            expected="the package `datasets`",
            got="not installed",
            fix="pip install 'ntk-awt[hub]'",
        ) from None
    try:
        splits = datasets.load_dataset(config.name.removeprefix("hub:"))
    except Exception as error:  # not found, no network, bad files: it raises one of many kinds
        expected = "a hub name or a folder that `datasets` can load"
        raise InputError(where, expected=expected, got=_line(error)) from error
    if missing := [part for part in ("train", "test") if part not in splits]:
        got = f"{', '.join(map(str, splits))} (no {', '.join(missing)})"
        raise InputError(where, expected="splits train and test", got=got)

    features = dict(splits["train"].features)
    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    pixels = {c: kind for c, f in features.items() if (kind := _pixel_type(f))}
    x = _only(where, "image column (of type Image, or arrays)", images or list(pixels), features)
    labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    labels = labels or [c for c in ("label", "labels", "y") if c in features and c != x]
    y = _only(where, "label column (of type ClassLabel, or named label)", labels, features)

    names, arrays = [], []
    for part in ("train", "test"):
        names += [f"{part} column {x}", f"{part} column {y}"]
        try:
            arrays += [_pixels(splits[part], x, pixels.get(x)), _labels(splits[part], y)]
        except Exception as error:  # an image that cannot be decoded raises one of many kinds
            what, expected = f"{where}: {names[-2]}", "readable images of one shape"
            raise InputError(what, expected=expected, got=_line(error)) from error
    return _checked(where, names, arrays)


def _pixel_type(feature: Any) -> str | None:
    """Number type of a column of arrays; None for every other column."""
    inner = feature
    while isinstance(inner, list) or hasattr(inner, "feature"):
        inner = inner[0] if isinstance(inner, list) else inner.feature
    if inner is feature and not hasattr(feature, "shape"):
        return None
    dtype = str(getattr(inner, "dtype", None))
    return dtype if dtype.startswith(("uint", "int", "float")) else None


def _only(where: str, what: str, found: Sequence[str], columns: Iterable[str]) -> str:
    if len(found) != 1:
        got = f"{' and '.join(found) or 'none'} among the columns {', '.join(columns)}"
        raise InputError(where, expected=f"one {what}", got=got)
    return found[0]


def _labels(split: Any, column: str) -> np.ndarray:
    return np.asarray(split.select_columns([column])[:][column])


def _pixels(split: Any, column: str, dtype: str | None) -> np.ndarray:
    """A column of arrays (of that dtype), or of pictures (if it is None), as one array."""
    split = split.select_columns([column])
    if dtype:
        return np.asarray(split.with_format("numpy", dtype=dtype)[:][column])
    pictures = [row[column] for row in split]
    if other := {str(getattr(p, "mode", p)) for p in pictures} - {"L", "RGB"}:
        # The numbers of any other mode are not grey values or colours, e.g. places in a palette.
        raise ValueError(f"pictures of mode {', '.join(sorted(other))}; make them L or RGB")
    return np.stack([np.asarray(p) for p in pictures])


DATASETS: dict[str, Callable[[DataConfig, int], Raw]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _mnist,
    "cifar10": _cifar10,
}
"""Loaders by name: `(config, seed) -> Raw`."""
