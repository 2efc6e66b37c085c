"""A backbone of two levels, for tests that look at what a method does with one."""

import torch
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    """Two levels, the coarser at half the resolution."""

    def __init__(self, config):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if config.dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first = nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.Tanh(), conv(4, 4, 3, padding=1))
        self.last = nn.Sequential(conv(8, config.features, 3, padding=1), norm(config.features), nn.Tanh())
        self.out_channels, self.encoder_channels = config.features, (4, 4)

    def encode(self, x):
        fine = self.first(x)
        return [fine, fine[..., ::2, ::2] ** 2]

    def decode(self, maps, size):
        return self.last(torch.cat([maps[0], F.interpolate(maps[1], size)], 1))

    def forward(self, x):
        return self.decode(self.encode(x), x.shape[2:])
