"""Byway on any nn.Module, with your own training loop: a classifier learns a second task without forgetting the first.

A multi-layer perceptron learns to classify digits. Then it is frozen, and LoRA with rank 4 learns the same digits
rotated by 90 degrees. With the adapter disabled, the model classifies upright digits exactly as before.

    python examples/own_loop_mlp.py            # MNIST from $BYWAY_DATA/mnist, or else generated digits
"""

from __future__ import annotations

import argparse
import gzip
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import byway

# segments of a seven-segment display: top, upper left, upper right, middle, lower left, lower right, bottom
STROKES = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")
PLACES = [(4, slice(8, 20)), (slice(4, 14), 8), (slice(4, 14), 19), (13, slice(8, 20))]
PLACES += [(slice(14, 24), 8), (slice(14, 24), 19), (23, slice(8, 20))]


def idx(path: Path) -> Tensor:
    """Read a gzipped file in MNIST's format: magic number, dimensions as big-endian integers, bytes."""
    raw = gzip.decompress(path.read_bytes())
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * len(sizes) :]), dtype=torch.uint8).reshape(sizes)


def drawn(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw seven-segment digits, shifted and with noise."""
    labels = torch.randint(10, (count,), generator=g)
    images = torch.zeros(count, 28, 28)
    for image, label in zip(images, labels.tolist(), strict=True):
        for stroke, (row, column) in zip(STROKES[label], PLACES, strict=True):
            image[row, column] = float(stroke)
        shift = torch.randint(-3, 4, (2,), generator=g).tolist()
        image.copy_(image.roll(shift, (0, 1)))
    return images + 0.3 * torch.rand(images.shape, generator=g), labels


def digits(folder: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test data, each (images, labels); images (n, 28, 28) between 0 and 1."""
    if folder is None or not folder.is_dir():
        print(f"no MNIST in {folder or '$BYWAY_DATA'}: using generated digits")
        g = torch.Generator().manual_seed(0)
        return drawn(4000, g), drawn(1000, g)
    names = [(folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
    train, test = [(idx(images).float() / 255, idx(labels).long()) for images, labels in names]
    return train, test


def fit(model: nn.Module, parameters: Iterable[Tensor], images: Tensor, labels: Tensor, steps: int) -> None:
    """Train with AdamW on random batches of 64."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps, for the base and for the adapter")
    parser.add_argument("--mnist", type=Path, help="directory with MNIST's four .gz files; default: $BYWAY_DATA/mnist")
    given = parser.parse_args(arguments)
    data = os.environ.get("BYWAY_DATA")
    (images, labels), (held_out, truth) = digits(given.mnist or (Path(data) / "mnist" if data else None))
    rotated = held_out.rot90(1, (1, 2))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    fit(model, model.parameters(), images, labels, given.steps)
    first = accuracy(model, held_out, truth)
    print(f"base:         upright {first:.3f}, rotated {accuracy(model, rotated, truth):.3f}")

    adapter = byway.attach(model, byway.LoRA(rank=4, targets="all-linear"), name="rotated")
    fit(model, [p for _, p in adapter.named_parameters()], images.rot90(1, (1, 2)), labels, given.steps)
    print(f"with adapter: upright {accuracy(model, held_out, truth):.3f}, rotated {accuracy(model, rotated, truth):.3f}")
    print(f"parameters:   {adapter.num_parameters:,} trainable of {sum(p.numel() for p in model.parameters()):,}")

    with byway.disabled(model):
        again = accuracy(model, held_out, truth)
    print(f"disabled:     upright {again:.3f}, {'exactly as before' if again == first else 'NOT as before'}")
    print(byway.merge(model, "rotated"))
    print(f"merged:       rotated {accuracy(model, rotated, truth):.3f}, a plain {type(model).__name__} again")


if __name__ == "__main__":
    main()
