"""Memory layout of maps [B, C, *S]: channels-last or contiguous, and gradients that follow their map."""

import torch
from torch import Tensor


def memory_format(ndim: int) -> torch.memory_format:
    """channels-last of a [B, C, *S] tensor with `ndim` axes."""
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def is_channels_last(features: Tensor) -> bool:
    """Whether `features` [B, C, *S] is dense with the channels last, and not contiguous as well."""
    return features.is_contiguous(memory_format=memory_format(features.ndim)) and not features.is_contiguous()


def new_empty(like: Tensor, shape, channels_last: bool) -> Tensor:
    """Uninitialised [B, C, *S] of the dtype and device of `like`, channels-last or contiguous."""
    if not channels_last:
        return like.new_empty(shape)
    batch, channels, *spatial = shape
    return like.new_empty((batch, *spatial, channels)).movedim(-1, 1)
