"""Draws on the generator's device, handed to the device of the images without waiting."""

import torch


def uniform(shape, low: float, high: float, generator: torch.Generator | None, device) -> torch.Tensor:
    """float32 U(low, high). A CPU generator gives the same numbers on every device."""
    source = device if generator is None else generator.device
    draw = torch.rand(shape, generator=generator, device=source) * (high - low) + low
    return draw.to(device, non_blocking=True)


def normal(shape, generator: torch.Generator | None, device) -> torch.Tensor:
    """float32 N(0, 1)."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device, non_blocking=True)
