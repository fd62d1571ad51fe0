"""launch/images.py: both layouts of a data directory, and a clear error for each way in which one can be wrong."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from images import FolderImages, open_images, read_idx
from PIL import Image


def write_idx(path, data):
    raw = bytes([0, 0, 8, data.ndim]) + struct.pack(f">{data.ndim}I", *data.shape) + data.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def idx(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in ("train", 7), ("t10k", 5):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 4, 4)))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 3)
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in ("train", 3), ("val", 2):
        for name in "ant", "bee":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40 + 8 * i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    Image.new("L", (20, 50), 7).save(tmp_path / "train" / "bee" / "grey.JPEG")
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    return tmp_path


def test_idx_files_compressed_or_not_and_both_spellings(idx):
    train, test = open_images(idx)
    assert (len(train), len(test), train.channels, train.size, train.classes) == (7, 5, 1, 4, ["0", "1", "2"])
    expected = read_idx(idx / "train-images-idx3-ubyte.gz")
    pixels, labels = train.__getitems__([5, 0])
    assert torch.equal(pixels, expected[[5, 0]].unsqueeze(1)) and labels.tolist() == [2, 0]
    assert train.mean[0] == pytest.approx((expected.double() / 255).mean().item())
    assert train.std[0] == pytest.approx((expected.double() / 255).std(correction=0).item())
    assert (test.mean, test.std) == (train.mean, train.std)

    compressed = idx / "train-images-idx3-ubyte.gz"
    (idx / "train-images.idx3-ubyte").write_bytes(gzip.decompress(compressed.read_bytes()))
    compressed.unlink()
    assert torch.equal(open_images(idx)[0].__getitems__([5, 0]).pixels, pixels)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda raw: raw[:-1], "header promises"),
    (lambda raw: raw[:6], "not an IDX file"),
    (lambda raw: b"\0\0\x0d" + raw[3:], "unsigned bytes"),
    (lambda raw: b"", "not an IDX file"),
])
def test_damaged_idx_file_is_named(tmp_path, damage, message):
    path = tmp_path / "labels"
    write_idx(path, np.arange(5))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        read_idx(path)


def test_damaged_gzip_is_named(idx):
    path = idx / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t10k-labels.*damaged gzip"):
        open_images(idx)


def test_labels_that_do_not_fit_the_images(idx):
    write_idx(idx / "train-labels-idx1-ubyte.gz", np.arange(6) % 3)
    with pytest.raises(ValueError, match="7 images of 4x4 pixels and 6 labels"):
        open_images(idx)
    write_idx(idx / "train-labels-idx1-ubyte.gz", np.zeros(7))
    with pytest.raises(ValueError, match="different classes"):
        open_images(idx)


def test_missing_data_names_both_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*train/CLASS"):
        open_images(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="neither val nor test"):
        open_images(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        open_images(tmp_path)


def test_folders(folders):
    train, test = open_images(folders, image_size=16)
    assert (train.classes, len(train), len(test)) == (["ant", "bee"], 7, 4)
    assert train.labels == [0, 0, 0, 1, 1, 1, 1] and test.labels == [0, 0, 1, 1]
    pixels, labels = train.__getitems__([6, 0, 4])
    assert pixels.shape == (3, 3, 16, 16) and pixels.dtype == torch.uint8 and labels.tolist() == [1, 0, 1]
    assert (pixels[0].int() - 7).abs().max() <= 1, "a grey JPEG becomes RGB"


def test_a_class_missing_in_one_split_is_refused(folders):
    (folders / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="different classes"):
        open_images(folders, image_size=16)


def test_a_damaged_image_is_named(folders):
    path = folders / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bee/1\.png: "):
        open_images(folders, image_size=16)[1].__getitems__([3])


def test_augmentation_depends_on_seed_epoch_and_index_only(folders):
    def images(seed, epoch, indices=(0, 1, 2, 3)):
        data = FolderImages(folders / "train", 16, augment=True, seed=seed)
        data.epoch = epoch
        return data.__getitems__(list(indices)).pixels

    assert torch.equal(images(0, 1), images(0, 1))
    assert torch.equal(images(0, 1, (3, 1))[1], images(0, 1)[1]), "whatever else is in the batch"
    assert not torch.equal(images(0, 1), images(0, 2)) and not torch.equal(images(0, 1), images(1, 1))


def test_the_test_split_is_a_centre_crop(tmp_path):
    # A bright square left of the middle: a flip, a shift or another scale would move its edges.
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[12:20, 16:24] = 255
    for split in "train", "val":
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
    image = open_images(tmp_path, image_size=28)[1].__getitems__([0]).pixels[0, 0]
    rows, columns = (image > 127).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 17, 6, 13)
