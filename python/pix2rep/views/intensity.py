"""PGL's random changes of intensity (section `pgl`): noise, blur, contrast, gamma, every image its own draw, in a batch on the device."""

import torch

from pix2rep.method_config import PglConfig
from pix2rep.views.photometric import blur
from pix2rep.views.random import normal, uniform


class Intensity:
    """Images [B, 1, *S] float in [0, 1] -> the same shape and dtype; noise may leave the range."""

    def __init__(self, config: PglConfig):
        self.config = config

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        config, single = self.config, (len(x),) + (1,) * (x.dim() - 1)

        def draw(low: float, high: float) -> torch.Tensor:
            return uniform(single, low, high, generator, x.device).to(x.dtype)

        deviation = draw(0, config.noise_variance).sqrt() * config.noise_unit * (draw(0, 1) < config.noise_p)
        x = x + deviation * normal(x.shape, generator, x.device).to(x.dtype)
        sigma = draw(*config.blur_sigma).flatten()
        x = blur(x, sigma, draw(0, 1) < config.blur_p, config.blur_sigma[1])
        factor = draw(*config.contrast)
        x = torch.where(draw(0, 1) < config.contrast_p, (x * factor).clamp(0, 1), x)
        power = draw(*config.gamma)
        return torch.where(draw(0, 1) < config.gamma_p, x.clamp(min=0) ** power, x)
