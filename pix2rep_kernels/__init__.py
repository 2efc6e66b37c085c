"""Fused kernels and losses for dense self-supervised pre-training: N x N pixel contrast in O(N D) memory."""

from pix2rep_kernels.dispatch import why_not
from pix2rep_kernels.losses.pix2rep import Pix2RepLoss
from pix2rep_kernels.ops.align import align
from pix2rep_kernels.ops.crosscorr import crosscorr
from pix2rep_kernels.ops.infonce import infonce
from pix2rep_kernels.ops.joint import joint
from pix2rep_kernels.ops.lncc import lncc
from pix2rep_kernels.ops.pool import pool
from pix2rep_kernels.ops.warp import warp

__version__ = "0.1.0"
__all__ = ["Pix2RepLoss", "align", "crosscorr", "infonce", "joint", "lncc", "pool", "warp", "why_not"]
