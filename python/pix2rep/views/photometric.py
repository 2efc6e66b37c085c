"""Random changes of intensity, every image its own draw, in a batch on the device and without waiting for it.

Orders of the official codes: `ORDERS`, then inversion. Intensities enter in [0, 1] and may leave it: the power of gamma needs a base that is
not negative, so there they are clamped, and Pix2Rep-v2 inverts values clamped to [0, 1].
"""

import itertools
import math

import torch
import torch.nn.functional as F

from pix2rep.config import PhotometricConfig
from pix2rep.views.random import normal, uniform

BIAS_ORDER = 3  # of the polynomial
ORDERS = {"v1": ("noise", "blur", "gamma", "bias", "rescale"), "v2": ("bias", "rescale", "blur", "gamma", "noise")}


class Photometric:
    """Images [B, 1, *S] float in [0, 1] -> the same shape and dtype, S of two or three axes."""

    def __init__(self, config: PhotometricConfig):
        _check(config)
        self.config = config
        self._terms: tuple[object, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if x.dim() not in (4, 5) or x.shape[1] != 1 or not x.is_floating_point():
            raise ValueError(f"x must be a float tensor [B, 1, *S] with 2 or 3 axes S, got {x.dtype} {list(x.shape)}")
        config = self.config
        extent = {"noise": config.noise_std, "blur": config.blur_sigma, "gamma": config.log_gamma, "bias": config.bias_coefficients, "rescale": 1}
        for name in ORDERS[config.order]:
            if getattr(config, f"{name}_p") and extent[name]:
                x = getattr(self, f"_{name}")(x, generator)
        if config.invert_p:
            inside = x.clamp(0, 1) if config.order == "v2" else x
            x = torch.where(self._drawn(x, config.invert_p, generator), 1 - inside, x)
        return x

    def _drawn(self, x: torch.Tensor, probability: float, generator) -> torch.Tensor:
        return uniform(_per_image(x), 0, 1, generator, x.device) < probability

    def _noise(self, x: torch.Tensor, generator) -> torch.Tensor:
        std = uniform(_per_image(x), 0, self.config.noise_std, generator, x.device) * self._drawn(x, self.config.noise_p, generator)
        return x + (std * normal(x.shape, generator, x.device)).to(x.dtype)

    def _gamma(self, x: torch.Tensor, generator) -> torch.Tensor:
        limit = self.config.log_gamma
        log_gamma = uniform(_per_image(x), -limit, limit, generator, x.device)
        return torch.where(self._drawn(x, self.config.gamma_p, generator), x.clamp(min=0) ** log_gamma.exp().to(x.dtype), x)

    def _rescale(self, x: torch.Tensor, generator) -> torch.Tensor:
        """The range between an image's percentiles to [U(rescale_low), U(rescale_high)], what is outside it to its ends."""
        config = self.config
        low, high = (uniform(_per_image(x), *ends, generator, x.device) for ends in (config.rescale_low, config.rescale_high))
        values = x.flatten(1).sort(1).values  # torch.quantile takes 16 million values at most
        first, last = (values[:, round(p / 100 * (values.shape[1] - 1))].view(_per_image(x)) for p in config.rescale_percentiles)
        share = ((x - first) / (last - first).clamp(min=1e-6)).clamp(0, 1)  # a flat image becomes `low`
        return torch.where(self._drawn(x, config.rescale_p, generator), (low + share * (high - low)).to(x.dtype), x)

    def _blur(self, x: torch.Tensor, generator) -> torch.Tensor:
        """Gaussian of sigma U(0, s) pixels, cut at three times the largest; edges repeat."""
        limit = self.config.blur_sigma
        sigma = uniform((len(x),), 0, limit, generator, x.device).clamp(min=1e-2)
        return blur(x, sigma, self._drawn(x, self.config.blur_p, generator), limit)

    def _bias(self, x: torch.Tensor, generator) -> torch.Tensor:
        """Images times exp of a cubic polynomial in coordinates from -1 to 1, all coefficients (the constant too) U(-c, c); 1 where not drawn."""
        terms = self._polynomials(tuple(x.shape[2:]), x.device)
        limit = self.config.bias_coefficients
        coefficients = uniform((len(x), len(terms)), -limit, limit, generator, x.device)
        coefficients = coefficients * self._drawn(x, self.config.bias_p, generator).view(-1, 1)
        return x * (coefficients @ terms).exp().view(x.shape).to(x.dtype)

    def _polynomials(self, size: tuple[int, ...], device) -> torch.Tensor:
        """[terms, prod(size)]: products of powers with a sum of at most 3."""
        if self._terms is None or self._terms[0] != (size, device):
            zero = torch.zeros(1, device=device)
            axes = torch.meshgrid(*(torch.linspace(-1, 1, n, device=device) if n > 1 else zero for n in size), indexing="ij")
            chosen = [p for p in itertools.product(range(BIAS_ORDER + 1), repeat=len(size)) if sum(p) <= BIAS_ORDER]
            terms = torch.stack([math.prod(axis**k for axis, k in zip(axes, p, strict=True)) for p in chosen])
            self._terms = ((size, device), terms.flatten(1))
        return self._terms[1]


def blur(x: torch.Tensor, sigma: torch.Tensor, drawn: torch.Tensor, limit: float) -> torch.Tensor:
    """Gaussian of sigma [B] pixels, cut at three times `limit`, for the images that `drawn` (bool, B entries) names; edges repeat."""
    radius = min(math.ceil(3 * limit), *(n - 1 for n in x.shape[2:])) if min(x.shape[2:]) > 1 else 0
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1)  # [B, 2r+1]
    untouched = (offsets == 0).float()
    weights = torch.where(drawn.view(-1, 1), weights, untouched).to(x.dtype)
    for axis in range(2, x.dim()):
        n, pad = x.shape[axis], [0, 0] * (x.dim() - 2)
        pad[2 * (x.dim() - 1 - axis) : 2 * (x.dim() - axis)] = [radius, radius]
        padded = F.pad(x, pad, mode="replicate")
        x = sum(padded.narrow(axis, k, n) * weights[:, k].view(_per_image(x)) for k in range(2 * radius + 1))
    return x


def _per_image(x: torch.Tensor) -> tuple[int, ...]:
    return (len(x),) + (1,) * (x.dim() - 1)


def _check(config: PhotometricConfig) -> None:
    for name, value in vars(config).items():
        if name == "order":
            if value not in ORDERS:
                raise ValueError(f"photometric.order must be one of {', '.join(ORDERS)}, got {value!r}")
        elif isinstance(value, tuple):
            most = 100 if name == "rescale_percentiles" else 1
            if not 0 <= value[0] <= value[1] <= most:
                raise ValueError(f"photometric.{name} must be LOW,HIGH with 0 <= LOW <= HIGH <= {most}, got {value}")
        elif name.endswith("_p") and not 0 <= value <= 1:
            raise ValueError(f"photometric.{name} must be a probability, got {value}")
        elif value < 0:
            raise ValueError(f"photometric.{name} must be at least 0, got {value}")
    if config.rescale_low[1] > config.rescale_high[0]:
        raise ValueError(f"photometric.rescale_low must end at or before {config.rescale_high[0]} (rescale_high), got {config.rescale_low}")
