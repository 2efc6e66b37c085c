"""Fused kernels and losses for dense self-supervised pre-training: N x N pixel contrast in O(N D) memory."""

from pix2rep_kernels.dispatch import why_not
from pix2rep_kernels.losses.pix2rep import Pix2RepLoss
from pix2rep_kernels.ops.infonce import infonce
from pix2rep_kernels.ops.warp import warp

__version__ = "0.1.0"
__all__ = ["Pix2RepLoss", "infonce", "warp", "why_not"]
