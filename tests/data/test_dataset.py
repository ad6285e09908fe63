"""Data: round trips with files written here, bad files by name, splits, and the real sets."""

import dataclasses
import doctest
import gzip
import itertools
import struct
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_awt.app.config import DataConfig
from ntk_awt.data import DATASETS, Dataset, Raw, dataset, load
from ntk_awt.errors import InputError

RNG = np.random.default_rng(0)
# Not square, so that swapped axes show; 10 classes, 6 images each.
IMAGES = RNG.integers(0, 256, (60, 6, 5), dtype=np.uint8)
LABELS = np.arange(60, dtype=np.uint8) % 10
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def write_mnist(
    folder: Path, *, end: str = "", dotted: bool = False, changed: dict[str, bytes] | None = None
) -> None:
    """The four files; `changed` replaces train_images, train_labels, t10k_images, t10k_labels."""
    contents = {
        "train_images": idx(IMAGES),
        "train_labels": idx(LABELS),
        "t10k_images": idx(IMAGES[:20, ::-1].copy()),
        "t10k_labels": idx(LABELS[:20]),
    } | (changed or {})
    for name, content in zip(MNIST_FILES, contents.values(), strict=True):
        write(folder / ((name.replace("-idx", ".idx") if dotted else name) + end), content)


def cifar_bytes(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The published format, written out record by record: label, red, green, blue."""
    records = bytearray()
    for image, label in zip(images, labels, strict=True):
        records.append(int(label))
        for channel in range(3):
            records += bytes(np.ascontiguousarray(image[:, :, channel]))
    return bytes(records)


COLOURS = RNG.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def write_npz(path: Path, **changed: Any) -> str:
    arrays = {
        "x_train": IMAGES,
        "y_train": LABELS,
        "x_test": IMAGES[:20],
        "y_test": LABELS[:20],
    } | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def rows(images: np.ndarray, scale: float = 255) -> list[bytes]:
    """The images as sorted byte strings: a set of images, whatever their order."""
    return sorted(bytes(image) for image in np.rint(images * scale).astype(np.uint8))


def both(part: Dataset) -> np.ndarray:
    return np.concatenate([part.x_train, part.x_validation])


def error_of(config: DataConfig, *names: str) -> str:
    """The InputError's line, which must name all of `names`."""
    with pytest.raises(InputError) as caught:
        load(config, 0)
    line = str(caught.value)
    assert "\n" not in line
    for name in names:
        assert name in line, line
    return line


# --- files, round trip ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_round_trip(tmp_path, name, end, dotted):
    write_mnist(tmp_path / name, end=end, dotted=dotted)
    found = load(DataConfig(name, data_dir=tmp_path), 0)
    assert found.image_shape == (6, 5, 1)
    assert found.num_classes == 10
    assert rows(both(found)) == rows(IMAGES, 1)
    # The whole test part keeps the file's order.
    np.testing.assert_array_equal(found.x_test[..., 0], IMAGES[:20, ::-1] / np.float32(255))
    np.testing.assert_array_equal(found.y_test, LABELS[:20])
    # Labels stay with their images.
    label_of = {bytes(image): label for image, label in zip(IMAGES, LABELS, strict=True)}
    for image, label in zip(found.x_train, found.y_train, strict=True):
        assert label_of[bytes(np.rint(image * 255).astype(np.uint8))] == label


@pytest.mark.parametrize("end", ["", ".gz"])
def test_cifar_round_trip(tmp_path, end):
    labels = LABELS[:40]
    write(tmp_path / f"data_batch_1.bin{end}", cifar_bytes(COLOURS[:20], labels[:20]))
    write(tmp_path / f"data_batch_3.bin{end}", cifar_bytes(COLOURS[20:], labels[20:]))
    write(tmp_path / f"test_batch.bin{end}", cifar_bytes(COLOURS[:10], labels[:10]))
    found = load(DataConfig("cifar10", data_dir=tmp_path), 0)
    assert found.image_shape == (32, 32, 3)
    assert rows(both(found)) == rows(COLOURS, 1)
    np.testing.assert_array_equal(found.x_test, COLOURS[:10] / np.float32(255))
    # A reader that takes the bytes as channels-last has the right shape, and other pixels.
    pixels = np.frombuffer(cifar_bytes(COLOURS[:10], labels[:10]), np.uint8).reshape(10, 3073)[
        :, 1:
    ]
    wrong = pixels.reshape(10, 32, 32, 3) / np.float32(255)
    assert wrong.shape == found.x_test.shape
    assert not np.allclose(wrong, found.x_test)


def test_npz_adds_a_channel_and_keeps_flat_features(tmp_path):
    for shape, expected in (
        ((6, 5), (6, 5, 1)),
        ((6, 5, 1), (6, 5, 1)),
        ((2, 5, 3), (2, 5, 3)),
        ((30,), (30,)),
    ):
        x = IMAGES.reshape(60, *shape)
        name = write_npz(tmp_path / "a.npz", x_train=x, x_test=x[:20])
        found = load(DataConfig(name), 0)
        assert found.image_shape == expected
        np.testing.assert_array_equal(found.x_test, x[:20].reshape(20, *expected) / np.float32(255))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_npz_floats_are_taken_as_they_are(tmp_path, dtype):
    x = (IMAGES / 255).astype(dtype)
    labels = LABELS.astype("int64") % 3
    name = write_npz(
        tmp_path / "a.npz", x_train=x, y_train=labels, x_test=x[:20], y_test=labels[:20]
    )
    found = load(DataConfig(name), 0)
    assert found.num_classes == 3
    assert found.x_train.dtype == np.float32
    assert found.y_train.dtype == np.int32
    np.testing.assert_array_equal(found.x_test[..., 0], x[:20].astype(np.float32))


def test_npz_classes_are_counted_over_both_parts(tmp_path):
    name = write_npz(tmp_path / "a.npz", y_test=np.full(20, 11))
    assert "12 classes" in error_of(DataConfig(name), "a.npz", "none of class 10")


def test_npz_is_found_in_the_data_folder(tmp_path):
    write_npz(tmp_path / "a.npz")
    assert len(load(DataConfig("a.npz", data_dir=tmp_path), 0).x_test) == 20


def test_uint8_to_float_is_exact(tmp_path):
    every = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    labels = np.array([0, 1, 0, 1])
    name = write_npz(tmp_path / "a.npz", x_train=every, x_test=every, y_train=labels, y_test=labels)
    found = load(DataConfig(name), 0).x_test[0]
    assert found[0] == 0.0
    assert found[255] == 1.0
    # Division in double, rounded once, is the nearest float32; and back again nothing is lost.
    np.testing.assert_array_equal(found, (np.arange(256) / 255).astype(np.float32))
    np.testing.assert_array_equal(np.rint(found * 255), np.arange(256))


def test_digits():
    found = load(DataConfig("digits"), 0)
    assert (len(found.x_train), len(found.x_validation), len(found.x_test)) == (1257, 140, 400)
    assert found.image_shape == (8, 8, 1)
    for x in (found.x_train, found.x_validation, found.x_test):
        assert (x.min(), x.max()) == (0, 1)
        np.testing.assert_array_equal(x * 16, np.rint(x * 16))
    from sklearn.datasets import load_digits

    pixels = np.asarray(load_digits(return_X_y=True)[0])
    assert rows(np.concatenate([both(found), found.x_test]), 16) == rows(pixels, 1)
    assert rows(load(DataConfig("digits"), 1).x_test, 16) != rows(found.x_test, 16)


def test_examples_in_the_docstrings_run():
    results = doctest.testmod(dataset)
    assert results.attempted >= 5
    assert not results.failed


# --- where files are looked for ------------------------------------------------------------------


def test_folder_order(tmp_path, monkeypatch):
    shapes = {"own": (60, 2, 2), "here": (60, 3, 3), "env": (60, 4, 4), "cwd": (60, 5, 5)}
    x = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}

    def put(folder: Path, which: str) -> None:
        images = {"train_images": idx(x[which]), "t10k_images": idx(x[which][:20])}
        write_mnist(folder, changed=images)

    put(tmp_path / "cwd" / "data" / "mnist", "cwd")
    put(tmp_path / "env", "env")
    put(tmp_path / "given", "here")
    put(tmp_path / "given" / "mnist", "own")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("NTK_AWT_DATA", "")  # set, but to nothing: as if it were not set

    def height(**more: Any) -> int:
        return load(DataConfig("mnist", **more), 0).image_shape[0]

    assert height() == 5
    monkeypatch.setenv("NTK_AWT_DATA", str(tmp_path / "env"))
    assert height() == 4
    assert height(data_dir=tmp_path / "given") == 2
    assert height(data_dir=tmp_path / "given" / "mnist") == 2
    # A complete folder beats a more specific one with a file missing: files are never mixed.
    (tmp_path / "given" / "mnist" / MNIST_FILES[3]).unlink()
    assert height(data_dir=tmp_path / "given") == 3


def test_mnist_is_never_taken_for_fashion_mnist(tmp_path):
    write_mnist(tmp_path / "mnist")
    error_of(DataConfig("fashion_mnist", data_dir=tmp_path / "mnist"), "train-images-idx3-ubyte")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_files(tmp_path, name):
    first = {"mnist": "train-images-idx3-ubyte", "cifar10": "data_batch_1.bin"}[name]
    config = DataConfig(name, data_dir=tmp_path)
    folders = f"{tmp_path / name} or {tmp_path}"
    error_of(config, first, folders, "--data-dir", "NTK_AWT_DATA")


def test_one_missing_file_is_the_one_named(tmp_path):
    write_mnist(tmp_path, end=".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    error_of(DataConfig("mnist", data_dir=tmp_path), "t10k-labels-idx1-ubyte")
    write(tmp_path / "c" / "data_batch_2.bin", cifar_bytes(COLOURS[:20], LABELS[:20]))
    error_of(DataConfig("cifar10", data_dir=tmp_path / "c"), "test_batch.bin")


def test_unknown_name_lists_the_known_ones():
    line = error_of(DataConfig("mnits"), "FILE.npz", "hub:NAME", *DATASETS)
    assert "did you mean 'mnist'" in line


# --- bad files -----------------------------------------------------------------------------------

BAD_IDX = {
    "truncated": ("train_images", idx(IMAGES)[:-1], "expected 1800 bytes"),
    "too long": ("train_images", idx(IMAGES) + b"x", "got 1801"),
    "header only": ("train_images", idx(IMAGES)[:9], "9 bytes in all"),
    "empty": ("t10k_labels", b"", "got nothing"),
    "magic": ("train_images", b"\1" + idx(IMAGES)[1:], "01 00 08 03"),
    "dtype": ("train_images", b"\0\0\x0d" + idx(IMAGES)[3:], "00 00 0d 03"),
    "dimensions": ("train_images", idx(IMAGES.reshape(60, 30)), "3 dimensions"),
    "labels as images": ("t10k_images", idx(LABELS), "00 00 08 01"),
    "count": ("train_labels", idx(LABELS[:59]), "expected shape (60,)"),
    "label 11": ("train_labels", idx(np.where(LABELS == 3, 11, LABELS).astype("uint8")), "0…11"),
    "no images": ("t10k_images", idx(IMAGES[:0]), "at least one"),
    "other size": ("t10k_images", idx(IMAGES[:20, :5].copy()), "shape (6, 5)"),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx(tmp_path, case, end):
    which, content, message = BAD_IDX[case]
    write_mnist(tmp_path, end=end, changed={which: content})
    file = which.replace("_", "-") + ("-idx3-ubyte" if "images" in which else "-idx1-ubyte") + end
    error_of(DataConfig("mnist", data_dir=tmp_path), str(tmp_path / file), message)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-20],  # cut off
        lambda packed: packed[:200] + bytes(20) + packed[220:],  # damaged inside
        lambda packed: packed[:10] + b"\xff" + packed[11:],  # no such kind of block
        lambda packed: packed[:-8] + bytes(8),  # wrong check sum
        gzip.decompress,  # not packed at all, e.g. by a browser that unpacks what it loads
    ],
)
def test_corrupt_gzip(tmp_path, damage):
    write_mnist(tmp_path, end=".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    error_of(DataConfig("mnist", data_dir=tmp_path), str(path), "gzip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cifar_bytes(COLOURS[:20], LABELS[:20])[:-1], "records of 3073 bytes"),
        (b"", "got 0 bytes"),
        (cifar_bytes(COLOURS[:20], LABELS[:20] + 2), "2…11"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_2.bin", "test_batch.bin"])
def test_bad_cifar(tmp_path, content, message, file):
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        good = cifar_bytes(COLOURS[:20], LABELS[:20])
        write(tmp_path / name, content if name == file else good)
    error_of(DataConfig("cifar10", data_dir=tmp_path), str(tmp_path / file), message)


NAN = np.where(np.arange(5) == 2, np.nan, IMAGES / 255)
BAD_NPZ = {
    "keys": ({"x_test": None}, "expected arrays x_train, y_train, x_test, y_test"),
    "0…255": ({"x_train": IMAGES.astype(float)}, "x_train: expected values in [0, 1]"),
    "integers": ({"x_test": IMAGES[:20].astype(int)}, "x_test: expected floating-point images"),
    "NaN": ({"x_train": NAN}, "x_train: expected finite values, got 360 of 1800"),
    "objects": ({"x_train": IMAGES.astype(object)}, "expected readable arrays of numbers"),
    "text": ({"y_train": LABELS.astype(str)}, "y_train: expected integer labels"),
    "5 axes": ({"x_train": IMAGES[..., None, None]}, "x_train: expected images"),
    "1 axis": ({"x_train": LABELS}, "x_train: expected images"),
    "no images": ({"x_test": IMAGES[:0], "y_test": LABELS[:0]}, "x_test: expected images"),
    "other shape": ({"x_test": IMAGES[:20, 1:]}, "x_test: expected shape (6, 5)"),
    "float labels": ({"y_test": LABELS[:20] / 1.0}, "y_test: expected integer labels"),
    "one-hot": ({"y_train": np.eye(10, dtype=int)[LABELS]}, "y_train: expected shape (60,)"),
    "negative": ({"y_train": LABELS.astype(int) - 1}, "y_train: expected labels in 0"),
    "huge label": ({"y_test": np.full(20, 2**31 - 1)}, "each of the 2147483648 classes"),
    "too huge": ({"y_test": np.full(20, 2**40)}, "y_test: expected labels in 0"),
    "gap": ({"y_train": LABELS + (LABELS > 4)}, "none of class 5"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(tmp_path, case):
    changed, message = BAD_NPZ[case]
    name = write_npz(tmp_path / "bad.npz", **changed)
    error_of(DataConfig(name), name, message)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    error_of(DataConfig(str(path)), "a.npz", str(tmp_path), "no such file")
    for content in (b"", b"hello", b"\x93NUMPY" + bytes(50)):
        path.write_bytes(content)
        error_of(DataConfig(str(path)), str(path), "expected an archive by numpy.savez")


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["idx", "idx.gz", "cifar.gz", "npz"]),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    cut=st.booleans(),
)
def test_any_damage_is_an_input_error_or_harmless(tmp_path_factory, kind, place, byte, cut):
    folder = tmp_path_factory.getbasetemp() / f"damage-{kind}"
    name = "mnist" if kind.startswith("idx") else "cifar10"
    if kind == "npz":
        folder.mkdir(exist_ok=True)
        name = write_npz(folder / "a.npz")
        path = Path(name)
    elif name == "mnist":
        end = kind.removeprefix("idx")
        write_mnist(folder, end=end)
        path = folder / (MNIST_FILES[0] + end)
    else:
        for file in ("data_batch_1.bin.gz", "test_batch.bin.gz"):
            write(folder / file, cifar_bytes(COLOURS[:20], LABELS[:20]))
        path = folder / "data_batch_1.bin.gz"
    content = path.read_bytes()
    at = int(place * len(content))
    path.write_bytes(content[:at] + (b"" if cut else bytes([byte]) + content[at + 1 :]))
    try:
        load(DataConfig(name, data_dir=folder), 0)
    except InputError as error:
        # The damage may change labels, so that the set as a whole is at fault, not the file.
        assert path.name in str(error) or "each of the 10 classes" in str(error)  # noqa: PT017


# --- splits --------------------------------------------------------------------------------------


def ids(x: np.ndarray) -> list[int]:
    """The image numbers that `numbered` put into the pixels."""
    pixels = np.rint(x * 255).astype(int)
    return (256 * pixels[:, 0] + pixels[:, 1]).tolist()


def numbered(config: DataConfig, seed: int) -> Raw:
    """A set in which every image is its number, with classes of very different sizes."""
    sizes = (500, 40, 60, 3)
    numbers = np.arange(sum(sizes))
    x = np.stack([numbers // 256, numbers % 256], axis=1).astype(np.uint8)
    y = np.repeat(np.arange(4), sizes)
    return Raw(x, y, x, y, num_classes=4)


def load_numbered(seed: int, **settings_: Any) -> Dataset:
    with mock.patch.dict(DATASETS, numbered=numbered):
        return load(DataConfig("numbered", **settings_), seed)


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, fraction=st.floats(0.001, 0.9))
def test_train_and_validation_are_disjoint_and_complete(seed, fraction):
    found = load_numbered(seed, validation_fraction=fraction)
    assert len(found.x_validation) == max(1, round(fraction * 603))
    assert sorted(ids(found.x_train) + ids(found.x_validation)) == list(range(603))
    assert ids(found.x_test) == list(range(603))
    for y in (found.y_train, found.y_validation):
        assert len(set(y[: len(set(y))])) == len(set(y))  # one of each class comes first


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, size=st.integers(4, 542))
def test_smaller_train_size_is_a_beginning_and_leaves_validation_alone(seed, size):
    whole = load_numbered(seed)
    some = load_numbered(seed, train_size=size, test_size=size)
    assert ids(some.x_train) == ids(whole.x_train)[:size]
    assert ids(some.x_validation) == ids(whole.x_validation)
    assert len(set(ids(some.x_test))) == size
    assert set(some.y_train) == set(some.y_test) == {0, 1, 2, 3}


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, other=SEEDS)
def test_the_seed_decides_the_draw(seed, other):
    # The draw must not use the global state, nor move it.
    np.random.seed(1)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    found = load_numbered(seed, test_size=50)
    assert np.random.random() == expected  # noqa: NPY002
    assert load_numbered(seed, test_size=50).digest == found.digest
    if other != seed:
        again = load_numbered(other, test_size=50)
        assert ids(again.x_train) != ids(found.x_train)
        assert set(ids(again.x_validation)) != set(ids(found.x_validation))
        assert set(ids(again.x_test)) != set(ids(found.x_test))


@settings(max_examples=100, deadline=None)
@given(class_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=SEEDS)
def test_every_beginning_has_the_classes_in_proportion(class_sizes, seed):
    y = np.repeat(np.arange(len(class_sizes)), class_sizes)
    order = dataset._balanced_order(y, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(y)))
    classes, sizes = np.unique(y, return_counts=True)
    assert len(set(y[order[: len(classes)]])) == len(classes)
    counts = np.cumsum(y[order][:, None] == classes, axis=0)
    taken = np.arange(1, len(y) + 1)[:, None]
    # Ahead by at most one image, or behind by the one of each class that comes first.
    ahead = counts - taken * sizes / len(y)
    assert ahead.max() <= 1 + 1e-9
    assert (ahead >= -len(classes) * sizes / len(y) - 1e-9).all()


def test_the_draw_is_not_biased():
    """Each image of a class is as likely to be drawn as any other, and so is each place."""
    y = np.repeat([0, 1], 10)
    first = [dataset._balanced_order(y, np.random.default_rng(s))[0] for s in range(4000)]
    # 200 expected for each of 20 images, standard deviation 14.
    assert np.abs(np.bincount(first, minlength=20) - 200).max() < 5 * 14


def test_too_many_or_too_few_images():
    with mock.patch.dict(DATASETS, numbered=numbered):
        error_of(DataConfig("numbered", train_size=544), "train_size", "543 images left after")
        error_of(DataConfig("numbered", test_size=604), "test_size", "there are 603 images")
        error_of(DataConfig("numbered", train_size=3), "each of the 4 classes")
    one = Raw(IMAGES[:1], LABELS[:1], IMAGES[:1], LABELS[:1], num_classes=1)
    with mock.patch.dict(DATASETS, one=lambda config, seed: one):
        error_of(DataConfig("one"), "train_size", "there are 0 images left after validation")
    with pytest.raises(InputError, match="seed"):
        load(DataConfig("digits"), -1)


# --- the dataclass -------------------------------------------------------------------------------


def small() -> Dataset:
    x, y = (IMAGES / 255).astype(np.float32), LABELS.astype(np.int32)
    return Dataset("small", x, y, x[:10], y[:10], x[:20], y[:20], 10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": IMAGES}, "small: x_train: expected a NumPy array of float32, got uint8"),
        ({"y_test": LABELS[:20]}, "small: y_test: expected a NumPy array of int32, got uint8"),
        ({"y_test": LABELS[:20].tolist()}, "got list"),
        ({"x_validation": small().x_train * 2}, "small: x_validation: expected values in [0, 1]"),
        ({"x_test": small().x_test[:, 1:]}, "small: x_test: expected images of shape (6, 5)"),
        ({"y_train": small().y_train[1:]}, "small: y_train: expected shape (60,)"),
        ({"num_classes": 9}, "small: y_train: expected labels in 0…8"),
    ],
)
def test_dataset_checks_its_arrays(changed, message):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(small(), **changed)
    assert message in str(caught.value)


def test_digest_depends_on_every_array_and_only_on_content():
    one = small()
    assert len(one.digest) == 12
    assert dataclasses.replace(one, name="other").digest == one.digest
    backwards = np.ascontiguousarray(one.x_train[:, ::-1])[:, ::-1]  # same values, other strides
    assert dataclasses.replace(one, x_train=backwards).digest == one.digest
    digests = {one.digest}
    for field in ("x_train", "y_train", "x_validation", "y_validation", "x_test", "y_test"):
        array = getattr(one, field).copy()
        array.flat[0] = 1 - array.flat[0]
        digests.add(dataclasses.replace(one, **{field: array}).digest)
    assert len(digests) == 7
    # The same bytes with another boundary between two parts are other data.
    moved = dataclasses.replace(
        one,
        x_train=one.x_train.reshape(60, 5, 6),
        x_validation=one.x_validation.reshape(10, 5, 6),
        x_test=one.x_test.reshape(20, 5, 6),
    )
    assert moved.digest != one.digest


# --- hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`write(train, test=…, features=…)` makes a local Parquet data set; gives its config."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folders = (tmp_path / f"set{i}" for i in itertools.count())

    def make(columns: dict[str, Any], parts: tuple[str, ...] = ("train", "test"), **features: Any):
        table = datasets.Dataset.from_dict(
            columns, features=datasets.Features(features) if features else None
        )
        folder = next(folders)
        folder.mkdir()
        for part in parts:
            table.to_parquet(folder / f"{part}.parquet")
        return DataConfig(f"hub:{folder}")

    return make


def pictures(images: np.ndarray = IMAGES, mode: str | None = None) -> list[Any]:
    from PIL import Image

    made = [Image.fromarray(image) for image in images]
    return [picture.convert(mode) for picture in made] if mode else made


def test_hub_pictures(hub):
    from datasets import ClassLabel, Image, Value

    config = hub(
        {"what": LABELS.tolist(), "id": list(range(60)), "img": pictures()},
        what=ClassLabel(num_classes=10),
        id=Value("int32"),
        img=Image(),
    )
    found = load(config, 0)
    assert found.num_classes == 10
    np.testing.assert_array_equal(found.x_test[..., 0], IMAGES / np.float32(255))
    np.testing.assert_array_equal(found.y_test, LABELS)
    assert rows(both(found)) == rows(IMAGES, 1)


def test_hub_colour_pictures(hub):
    from datasets import Image, Value

    config = hub(
        {"image": pictures(COLOURS[:20]), "label": LABELS[:20].tolist()},
        image=Image(),
        label=Value("int64"),
    )
    np.testing.assert_array_equal(load(config, 0).x_test, COLOURS[:20] / np.float32(255))


@pytest.mark.parametrize("kind", ["nested", "array2d", "flat", "float"])
def test_hub_arrays(hub, kind):
    from datasets import Array2D, List, Value

    byte = Value("uint8")
    x, feature = {
        "nested": (IMAGES, List(List(byte))),
        "array2d": (IMAGES, Array2D((6, 5), "uint8")),
        "flat": (IMAGES.reshape(60, 30), List(byte)),
        "float": ((IMAGES / 255).astype(np.float32), Array2D((6, 5), "float32")),
    }[kind]
    config = hub({"x": list(x), "y": LABELS.tolist()}, x=feature, y=Value("int32"))
    found = load(config, 0)
    assert found.image_shape == ((30,) if kind == "flat" else (6, 5, 1))
    expected = IMAGES / np.float32(255)
    np.testing.assert_array_equal(found.x_test.reshape(60, 6, 5), expected)


def test_hub_bad_data(hub):
    from datasets import Image, List, Value

    y, pixels, byte = LABELS.tolist(), [[1, 2]] * 60, List(Value("uint8"))
    config = hub({"x": pixels, "y": y}, parts=("train",), x=byte, y=Value("int32"))
    error_of(config, config.name, "splits train and test", "no test")

    def bad(columns: dict[str, Any], *names: str, **features: Any) -> None:
        config = hub(columns, **features)
        error_of(config, config.name, *names)

    bad({"text": ["a"] * 60, "y": y}, "one image column", "got none among the columns text, y")
    bad({"a": pixels, "b": pixels, "y": y}, "got a and b among", a=byte, b=byte, y=Value("int8"))
    bad({"x": pixels, "class": y}, "one label column", "x, class")
    bad({"x": pixels, "y": ["a"] * 60}, "y: expected integer labels", x=byte, y=Value("string"))
    bad({"x": pixels, "y": y}, "train column x: expected floating-point images, got dtype int64")
    bad({"x": [[1], [1, 2]] * 30, "y": y}, "train column x", x=byte, y=Value("int8"))
    picture = {"image": Image(), "label": Value("int8")}
    uneven = pictures()[:59] + pictures(IMAGES[:1, :3].copy())
    bad({"image": uneven, "label": y}, "readable images of one shape", **picture)
    bad({"image": pictures(mode="P"), "label": y}, "mode P", **picture)
    bad({"image": [*pictures()[:59], None], "label": y}, "None", **picture)


def test_hub_not_found(tmp_path, hub):
    error_of(DataConfig(f"hub:{tmp_path / 'none'}"), str(tmp_path / "none"))
    error_of(DataConfig("hub:someone/no-such-set"), "hub:someone/no-such-set")


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    error_of(DataConfig("hub:mnist"), "hub:mnist", "pip install 'ntk-awt[hub]'")


# --- the real sets -------------------------------------------------------------------------------


def test_real_mnist(real_data):
    if not (real_data / "mnist").is_dir():
        pytest.skip(f"no mnist in {real_data}")
    config = DataConfig("mnist", data_dir=real_data)
    raw = DATASETS["mnist"](config, 0)
    assert raw.x_train.shape == (60_000, 28, 28)
    assert raw.x_test.shape == (10_000, 28, 28)
    assert raw.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(raw.y_train).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(raw.y_test).tolist() == counts

    found = load(config, 0)
    assert found.x_train.shape == (54_000, 28, 28, 1)
    assert len(found.x_validation) == 6_000
    assert (found.x_train.min(), found.x_train.max()) == (0, 1)
    # Published mean and standard deviation of MNIST's pixels.
    whole = both(found)
    assert abs(whole.mean(dtype=np.float64) - 0.1307) < 1e-4
    assert abs(whole.std(dtype=np.float64) - 0.3081) < 1e-4
    share = np.bincount(found.y_validation) / np.bincount(raw.y_train)
    np.testing.assert_allclose(share, 0.1, atol=1e-3)


def test_real_cifar10(real_data):
    if not (real_data / "cifar10").is_dir():
        pytest.skip(f"no cifar10 in {real_data}")
    config = DataConfig("cifar10", data_dir=real_data / "cifar10", train_size=2000)
    raw = DATASETS["cifar10"](config, 0)
    assert len(raw.x_train) % 10_000 == 0
    assert raw.x_train.shape[1:] == (32, 32, 3)
    assert np.bincount(raw.y_test).tolist() == [1000] * 10
    assert raw.y_train[:5].tolist() == [6, 9, 9, 4, 1]
    assert raw.y_test[:5].tolist() == [3, 8, 8, 0, 6]
    # Published channel means; red, green and blue differ, so swapped channels show.
    means = raw.x_test.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(means, [0.494, 0.485, 0.450], atol=2e-3)
    found = load(config, 0)
    # In proportion, up to one image ahead or behind, and one of each class comes first.
    share = np.bincount(raw.y_train) / len(raw.y_train)
    assert np.abs(np.bincount(found.y_train) - 2000 * share).max() < 2
    # Neighbouring pixels of a photograph are alike; read channels-last they are not.
    step = np.abs(np.diff(found.x_test[:100], axis=2)).mean()
    assert step < 0.06
