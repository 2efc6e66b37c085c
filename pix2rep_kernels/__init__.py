"""Fused kernels and losses for dense self-supervised pre-training: N x N pixel contrast in O(N D) memory."""

from pix2rep_kernels.dispatch import why_not
from pix2rep_kernels.losses.bim import BoundaryInfoMaxLoss
from pix2rep_kernels.losses.lrc import LocalRegionContrastLoss
from pix2rep_kernels.losses.pgl import PriorGuidedLocalLoss, box_grid
from pix2rep_kernels.losses.pix2rep import Pix2RepLoss
from pix2rep_kernels.ops.align import align
from pix2rep_kernels.ops.crosscorr import crosscorr
from pix2rep_kernels.ops.entropy import entropy
from pix2rep_kernels.ops.infonce import infonce
from pix2rep_kernels.ops.joint import joint
from pix2rep_kernels.ops.lncc import lncc
from pix2rep_kernels.ops.pool import pool
from pix2rep_kernels.ops.warp import warp
from pix2rep_kernels.superpixels import felzenszwalb

__version__ = "0.1.0"
__all__ = [
    "BoundaryInfoMaxLoss", "LocalRegionContrastLoss", "Pix2RepLoss", "PriorGuidedLocalLoss", "align", "box_grid", "crosscorr", "entropy", "felzenszwalb",
    "infonce", "joint", "lncc", "pool", "warp", "why_not",
]  # fmt: skip
