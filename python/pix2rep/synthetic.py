"""A batch that costs what a real one does: what `profile` runs where no folder is given."""

import torch
from torch import Tensor

from pix2rep.config import Config
from pix2rep.methods.base import Batch

BLOCK = {2: 8, 3: 8}  # voxels a side of a region: as many regions as superpixels of a slice make, of a patch more than are kept


def synthetic(config: Config, batch: int, needs: frozenset[str] = frozenset()) -> Batch:
    """Noise [batch, 1, *data.size] and what `needs` names beside it. Time and memory of the networks and of most losses do not depend on the values;
    those of a loss over regions depend on their number: they are blocks of BLOCK voxels a side.
    """
    size, generator = config.data.size, torch.Generator().manual_seed(config.pretrain.seed)
    images = torch.rand(batch, 1, *size, generator=generator)
    made = Batch(images)
    for name in needs:
        setattr(made, name, _MAKE[name](images))
    if made.crops is not None:
        made.crops[0] = images
    return made


def _regions(images: Tensor) -> Tensor:
    size = images.shape[2:]
    labels, count = torch.zeros(size, dtype=torch.int32), 1
    for axis, n in enumerate(size):
        block = torch.arange(n, dtype=torch.int32) // BLOCK[len(size)]
        labels += count * block.view(-1, *[1] * (len(size) - 1 - axis))
        count *= int(block[-1]) + 1
    return labels.expand(len(images), *size).contiguous()


def _boxes(images: Tensor) -> Tensor:
    """Each crop shares three quarters of every side with the other."""
    size = torch.tensor(images.shape[2:], dtype=torch.float32)
    edges = torch.tensor([[0.25, 1.0], [0.0, 0.75]])  # [crop, lower and upper]
    return (edges[:, :, None, None] * size).expand(2, 2, len(images), len(size)).contiguous()


_MAKE = {
    "regions": _regions,
    "crops": lambda images: torch.stack([images, images]),
    "boxes": _boxes,
    "spacing": lambda images: torch.ones(len(images), images.ndim - 2),
    "depths": lambda images: torch.linspace(0, 1, len(images) + 2)[1:-1],
    "indices": lambda images: torch.arange(len(images)),
}
