"""Labelled images from a directory: IDX files (MNIST, Fashion-MNIST) or one folder per class (ImageNet).

    DIR/train-images-idx3-ubyte[.gz]   DIR/train-labels-idx1-ubyte[.gz]      DIR/train/CLASS/*.JPEG
    DIR/t10k-images-idx3-ubyte[.gz]    DIR/t10k-labels-idx1-ubyte[.gz]       DIR/val/CLASS/*.JPEG
"""

from __future__ import annotations

import gzip
import os
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

FOLDER_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    pixels: Tensor  # uint8 [B, channels, size, size]
    labels: Tensor  # int64 [B]


class Images(Dataset[Batch]):
    """One split. ``__getitems__`` takes a list of indices and gives a whole batch (the protocol of torch's loader).

    Attributes:
        channels, size: of the images, which are square.
        classes: names, in the order of the labels.
        labels: one per image, indices into ``classes``.
        mean, std: per channel, of pixels in 0..1.
        epoch: to be set before each pass: random augmentation is a function of (seed, epoch, index) alone, so that
            it is the same on any number of ranks or workers and after a resume.
    """

    channels: int
    size: int
    classes: list[str]
    labels: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch: int = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Batch:
        raise NotImplementedError

    def names(self) -> Iterable[str]:
        """What tells one image from another, where that is more than its place in a file."""
        return ()

    def fingerprint(self) -> str:
        """How many images, and a checksum of their names and labels: another one where files are missing or added."""
        names = "\n".join(self.names()).encode(errors="surrogateescape")
        checksum = zlib.crc32(names, zlib.crc32(np.asarray(self.labels, np.int64).tobytes()))
        return f"{len(self)} images ({checksum:08x})"


def open_images(data_dir: Path, image_size: int | None = None, seed: int = 0) -> tuple[Images, Images]:
    """The training and the test split of a directory in one of the two layouts.

    Args:
        image_size: for folders, the size to crop to (224 if None). IDX images have a size of their own.
        seed: of the random crops and flips in the training split of folders.

    Raises:
        FileNotFoundError: neither layout was found, or a file or folder of it is missing.
        ValueError: a file is damaged, or the splits do not fit each other.
    """
    train: Images
    test: Images
    if (data_dir / "train").is_dir():
        held_out = next((data_dir / name for name in ("val", "test") if (data_dir / name).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"{data_dir}: there is a train folder, but neither val nor test beside it")
        train = FolderImages(data_dir / "train", image_size or 224, augment=True, seed=seed)
        test = FolderImages(held_out, image_size or 224, augment=False, seed=seed)
    else:
        train, test = IdxImages(data_dir, "train"), IdxImages(data_dir, "t10k")
        if image_size not in (None, train.size):
            raise ValueError(f"{data_dir}: these IDX images are {train.size} pixels wide, not {image_size}")
        test.mean, test.std, test.classes = train.mean, train.std, train.classes
    same = train.classes == test.classes and train.size == test.size
    if not same or max(test.labels) >= len(train.classes):
        raise ValueError(f"{data_dir}: the training and the test split have different classes or image sizes")
    return train, test


class IdxImages(Images):
    """All images of one split in memory, as they are: no augmentation."""

    def __init__(self, data_dir: Path, split: str) -> None:
        self._pixels = read_idx(_find_idx(data_dir, f"{split}-images", 3))
        labels = read_idx(_find_idx(data_dir, f"{split}-labels", 1)).long()
        if self._pixels.dim() != 3 or labels.dim() != 1:
            raise ValueError(f"{data_dir}: {split} is not a list of grey images with a list of labels")
        count, height, width = self._pixels.shape
        if len(labels) != count or count == 0 or height != width:
            raise ValueError(f"{data_dir}: {split} has {count} images of {height}x{width} pixels and "
                             f"{len(labels)} labels; as many labels as images, and square ones, are needed")
        self.channels, self.size, self._labels, self.labels = 1, width, labels, labels.tolist()
        self.classes = [str(label) for label in range(max(self.labels) + 1)]
        histogram = torch.bincount(self._pixels.flatten(), minlength=256).double() / self._pixels.numel()
        value = torch.arange(256, dtype=torch.float64) / 255
        mean = (histogram * value).sum()
        self.mean = (float(mean),)
        self.std = (float((histogram * (value - mean)**2).sum().sqrt().clamp(min=1e-6)),)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(self._pixels[indices].unsqueeze(1), self._labels[indices])


def _find_idx(data_dir: Path, stem: str, dimensions: int) -> Path:
    for separator in "-.":
        for suffix in ".gz", "":
            path = data_dir / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    raise FileNotFoundError(f"{data_dir}: no {stem}-idx{dimensions}-ubyte(.gz) in it, nor folders train/CLASS and "
                            "val/CLASS")


def read_idx(path: Path) -> Tensor:
    """A file of unsigned bytes in the IDX format: big-endian, magic 0 0 8 D, D sizes of 4 bytes, then the data.

    Returns:
        uint8, with the D dimensions of the file.

    Raises:
        ValueError: not such a file, or its length is not what its header says.
    """
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 * (1 + raw[3]):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    data = np.frombuffer(raw, np.uint8, offset=4 * (1 + raw[3]))
    if data.size != shape.prod():
        raise ValueError(f"{path}: {data.size} bytes of data, the header promises {shape.prod()}")
    return torch.from_numpy(data.reshape(shape).copy())


class FolderImages(Images):
    """One folder per class, images read when they are needed.

    Training: random area (8 to 100 %) and aspect ratio (3/4 to 4/3), resized, flipped half of the time (Szegedy et al.
    2015, as ImageNet is trained everywhere). Test: resized to 8/7 of the size, centre crop.
    """

    channels, mean, std = 3, IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, folder: Path, size: int, augment: bool, seed: int) -> None:
        self.size, self._augment, self._seed = size, augment, seed
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self._files: list[str] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            files = sorted(entry.path for entry in os.scandir(folder / name)
                           if os.path.splitext(entry.name)[1].lower() in FOLDER_SUFFIXES)
            self._files += files
            self.labels += [label] * len(files)
        if not self._files:
            raise FileNotFoundError(f"{folder}: no images ({', '.join(sorted(FOLDER_SUFFIXES))}) in folders of it")

    def __len__(self) -> int:
        return len(self._files)

    def names(self) -> Iterable[str]:
        return map(os.path.basename, self._files)

    def __getitems__(self, indices: list[int]) -> Batch:
        pixels = torch.stack([self._image(index) for index in indices])
        return Batch(pixels, torch.tensor([self.labels[index] for index in indices]))

    def _image(self, index: int) -> Tensor:
        try:
            with Image.open(self._files[index]) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{self._files[index]}: {error}") from error
        if self._augment:
            image = self._random_crop(image, random.Random(f"{self._seed} {self.epoch} {index}"))
        else:
            image = ImageOps.fit(image, (self.size * 8 // 7, self.size * 8 // 7), Image.Resampling.BICUBIC)
            edge = (image.width - self.size) // 2
            image = image.crop((edge, edge, edge + self.size, edge + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _random_crop(self, image: Image.Image, draw: random.Random) -> Image.Image:
        for _ in range(10):
            area = image.width * image.height * draw.uniform(0.08, 1.0)
            ratio = (4 / 3)**draw.uniform(-1, 1)
            width, height = round((area * ratio)**0.5), round((area / ratio)**0.5)
            if 0 < width <= image.width and 0 < height <= image.height:
                left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
                box = (left, top, left + width, top + height)
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
                break
        else:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)
        return ImageOps.mirror(image) if draw.random() < 0.5 else image
