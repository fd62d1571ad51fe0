"""launch/images.py: both layouts of a data directory, and a clear error for each way in which one can be wrong.
launch/vits.py: the sizes are the published ones, names that make no sense are refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from images import FolderImages, open_images, read_idx
from PIL import Image
from vits import build_vit, vit_config


def write_idx(path: Path, data: np.ndarray) -> None:
    raw = bytes([0, 0, 8, data.ndim]) + struct.pack(f">{data.ndim}I", *data.shape) + data.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def idx(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in ("train", 7), ("t10k", 5):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 4, 4)))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 3)


def folders(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in ("train", 3), ("val", 2):
        for name in "ant", "bee":
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40 + 8 * i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    Image.new("L", (20, 50), 7).save(folder / "train" / "bee" / "grey.JPEG")
    (folder / "train" / "bee" / "notes.txt").write_text("no image")


def test_idx_files_compressed_or_not_and_both_spellings(tmp_path):
    idx(tmp_path)
    train, test = open_images(tmp_path)
    assert (len(train), len(test), train.channels, train.size, train.classes) == (7, 5, 1, 4, ["0", "1", "2"])
    compressed = tmp_path / "train-images-idx3-ubyte.gz"
    expected = read_idx(compressed)
    pixels, labels = train.__getitems__([5, 0])
    assert torch.equal(pixels, expected[[5, 0]].unsqueeze(1)) and labels.tolist() == [2, 0]
    assert train.mean[0] == pytest.approx((expected.double() / 255).mean().item())
    assert train.std[0] == pytest.approx((expected.double() / 255).std(correction=0).item())
    assert (test.mean, test.std) == (train.mean, train.std)

    (tmp_path / "train-images.idx3-ubyte").write_bytes(gzip.decompress(compressed.read_bytes()))
    compressed.unlink()
    assert torch.equal(open_images(tmp_path)[0].__getitems__([5, 0]).pixels, pixels)


def test_folders(tmp_path):
    folders(tmp_path)
    train, test = open_images(tmp_path, image_size=16)
    assert (train.classes, len(train), len(test)) == (["ant", "bee"], 7, 4)
    assert train.labels == [0, 0, 0, 1, 1, 1, 1] and test.labels == [0, 0, 1, 1]
    pixels, labels = train.__getitems__([6, 0, 4])
    assert pixels.shape == (3, 3, 16, 16) and pixels.dtype == torch.uint8 and labels.tolist() == [1, 0, 1]
    assert (pixels[0].int() - 7).abs().max() <= 1, "a grey JPEG becomes RGB"


LABELS, ZIPPED, IMAGE = "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte.gz", "val/bee/1.png"


def labels(damage):
    """Uncompressed, and what ``damage`` makes of their bytes."""
    def write(folder):
        (folder / f"{LABELS}.gz").unlink()
        write_idx(folder / LABELS, np.arange(7) % 3)
        (folder / LABELS).write_bytes(damage((folder / LABELS).read_bytes()))

    return write


@pytest.mark.parametrize(("layout", "damage", "message"), [
    (idx, labels(lambda raw: raw[:-1]), f"{LABELS}: .*header promises"),
    (idx, labels(lambda raw: raw[:6]), f"{LABELS}: .*not an IDX file"),
    (idx, labels(lambda raw: b"\0\0\x0d" + raw[3:]), f"{LABELS}: .*unsigned bytes"),
    (idx, labels(lambda raw: b""), f"{LABELS}: .*not an IDX file"),
    (idx, lambda at: (at / ZIPPED).write_bytes((at / ZIPPED).read_bytes()[:-9]), "t10k-labels.*damaged gzip"),
    (idx, lambda at: write_idx(at / f"{LABELS}.gz", np.arange(6) % 3), "7 images of 4x4 pixels and 6 labels"),
    (idx, lambda at: write_idx(at / f"{LABELS}.gz", np.zeros(7)), "different classes"),
    (Path.exists, lambda at: None, "train-images-idx3-ubyte.*train/CLASS"),
    (Path.exists, lambda at: (at / "train").mkdir(), "neither val nor test"),
    (Path.exists, lambda at: [(at / split).mkdir() for split in ("train", "val")], "no images"),
    (folders, lambda at: (at / "val" / "cat").mkdir(), "different classes"),
    (folders, lambda at: (at / IMAGE).write_bytes((at / IMAGE).read_bytes()[:300]), r"bee/1\.png: "),
])
def test_what_is_missing_or_damaged_is_named(tmp_path, layout, damage, message):
    layout(tmp_path)
    damage(tmp_path)
    error = FileNotFoundError if layout is Path.exists else ValueError
    with pytest.raises(error, match=message):
        open_images(tmp_path)[1].__getitems__([3])


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path):
    folders(tmp_path)

    def images(seed, epoch, indices=(0, 1, 2, 3)):
        data = FolderImages(tmp_path / "train", 16, augment=True, seed=seed)
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


# Parameters in millions: DeiT table 1 (Ti 5, S 22), ViT table 1 (B 86, L 307, H 632).
@pytest.mark.parametrize(("name", "millions"),
                         [("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("L/16", 304.3), ("H/14", 632.0)])
def test_sizes_of_vits_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = build_vit(name, image_size=224, channels=3, classes=1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(("name", "message"), [
    *((name, "SIZE/PATCH") for name in ("B16", "B/", "B/0", "XXL/16", "b/16", "")),
    ("S/16", "these do: 2, 4, 7, 14, 28")])
def test_vits_that_make_no_sense_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        vit_config(name, 28, 1, 10)
