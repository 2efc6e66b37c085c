"""PGL: its own two crops of a volume, flipped, and the box that both show."""

import torch
from torch import Generator, Tensor, nn

from pix2rep.config import Config
from pix2rep.data.cache import Prepared, PreparedCase
from pix2rep.data.patches import PatchSource
from pix2rep.methods.pgl import PGL, flipped
from pix2rep.pairs import Views
from pix2rep.pictures import coarsest, full_resolution
from pix2rep.views.random import uniform


def draw(method: PGL, case: PreparedCase, generator: Generator) -> Views:
    size, options = method.config.data.size, method.options
    seed = int(torch.randint(2**31, (1,), generator=generator))
    source = PatchSource(Prepared(case.image_file.parent, [case]), [case.patient], size, seed, crops=options)
    index = source.case_slices(case)
    crops, boxes = source.crops(index), source.boxes(index)[:, :, 0].transpose(0, 1)
    flips = [uniform((1, 3), 0, 1, generator, "cpu") < torch.tensor(options.flip) for _ in crops]
    view_1, view_2 = (method.intensity(flipped(crop, flip), generator) for crop, flip in zip(crops, flips, strict=True))
    boxes = torch.stack([turned(box, flip[0], size) for box, flip in zip(boxes, flips, strict=True)])
    mirrored = flips[0][0] != flips[1][0]
    source, inside = correspondence(boxes, mirrored, size)
    return Views(view_1, view_2, source, inside, options.mode, boxes)


def turned(box: Tensor, flip: Tensor, size: tuple[int, ...]) -> Tensor:
    """Lower and upper faces [2, d] of a box in a crop, after the crop is flipped along the axes of bool [d]."""
    return torch.where(flip, torch.tensor(size) - box.flip(0), box)


def correspondence(boxes: Tensor, mirrored: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(pixels of view 1 [*S, d] that pixels of view 2 come from, bool [*S]: they lie in the common box).

    boxes: float [2, 2, d], lower and upper faces of the box in either view; mirrored: bool [d], axes along which it is the other way round.
    """
    (low_1, high_1), (low_2, high_2) = boxes
    places = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in size), indexing="ij"), -1)
    share = (places - low_2) / (high_2 - low_2)
    inside = ((share > -1e-6) & (share < 1 + 1e-6)).all(-1)
    share = torch.where(mirrored, 1 - share, share)
    return low_1 + share * (high_1 - low_1) - 0.5, inside


def features(method: PGL, backbone: nn.Module, view: Tensor) -> Tensor:
    return (coarsest if method.options.where == "encoder" else full_resolution)(method, backbone, view)


def words(config: Config) -> str:
    text = (
        "Views are drawn by the run's options `pgl`: two overlapping crops of a volume, resized to data.size, flipped, their intensities changed. The loss "
        "saw features through a projection head, and those of one crop of the moving average; neither is used here."
    )
    if config.pgl.where == "encoder":
        text += (
            " Features are the encoder's last map, a coarse one, interpolated to the crop's size: with pgl.where=encoder nothing trains the decoder. So "
            "colours are smooth, and a match within a few pixels is more than can be asked for."
        )
    return text
