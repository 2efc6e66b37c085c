"""LRC: Localized Region Contrast (arXiv 2304.03406, MICCAI 2023): region InfoNCE over superpixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep_kernels.check import expect, expect_choice, expect_device, expect_temperature, expect_tensor
from pix2rep_kernels.dispatch import CHOICES
from pix2rep_kernels.losses.common import compute_dtype, expect_finite, expect_like, expect_map, flag, whole
from pix2rep_kernels.ops.infonce import infonce
from pix2rep_kernels.ops.pool import LABELS, pool

NEGATIVES = ("image", "batch")
RANDOM_BITS = 40  # below a label in one sortable int64: two pixels draw the same key once in 2^40


class LocalRegionContrastLoss(nn.Module):
    """Contrast each region of one view with the same region of the other, against the other regions.

        mu(n) = mean of the features over the pixels, or over `num_samples` of them drawn at random, with label n;   z(n) = mu(n) / |mu(n)|
        loss  = -(1/R) sum_n log( exp(<z_q(n), z_k(n)> / tau) / sum_m exp(<z_q(n), z_k(m)> / tau) )

    over the R regions that both views have, as infonce(negatives="forward").

    The paper's code is unknown: that superpixels are contrasted beside a global loss is sourced; temperature, drawing (about 50 pixels a region), negatives,
    and where to normalise are inferred, hence options.

    Args:
        temperature: tau > 0.
        max_regions: labels 0 to max_regions - 1 are regions; a pixel with any other label, a negative one above all, belongs to none.
        normalize_first: L2-normalise the features of every pixel before the mean (the mean is normalised either way).
        negatives: other regions of the same "image", or of the whole "batch".
        num_samples: pixels drawn in each region, without repeats; all of a region that has fewer. None: every pixel.
        same_samples: the draw of the first view serves the second (for one label map only); else each draws its own.
        min_pixels: a region with fewer pixels, in either view, is left out.
        detach_keys: no gradient to features_k, as those of a momentum encoder.
        symmetric: also contrast the regions of the second view with those of the first, and take the mean (infonce, negatives="cross"). detach_keys holds
            for both directions.
        check_finite: raise on NaN or inf features, naming the argument; reads a value back from the device, so it stops CUDA graphs and fullgraph.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Shape:
        features_q, features_k: [B, C, *S] with 1 to 3 spatial axes, one floating dtype and device, any strides (channels-last is fastest). S may differ if
            labels_k is given.
        labels_q, labels_k: [B, *S] uint8, int8, int16, int32 or int64, a region of both views under one number; labels_k defaults to labels_q.
        generator: of the draw, on the features' device. `torch.compile(fullgraph=True)` holds for generator=None.
        output: scalar, float32 (float64 for float64 features): the mean over the regions of the batch that both views have; 0 when there is none. Pixels of no
            region or of a region left out get gradient exactly 0, whatever they hold.

    Raises:
        ValueError, TypeError: an argument is off; the message names argument, expectation and value.

    Example:
        >>> loss = LocalRegionContrastLoss(num_samples=50)(decoder(view_q), momentum_decoder(view_k), superpixels)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        max_regions: int = 512,
        normalize_first: bool = False,
        negatives: str = "image",
        *,
        num_samples: int | None = None,
        same_samples: bool = False,
        min_pixels: int = 1,
        detach_keys: bool = True,
        symmetric: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        expect_temperature(temperature)
        expect_choice(negatives, "negatives", NEGATIVES)
        expect_choice(backend, "backend", CHOICES)
        expect(whole(max_regions, "max_regions") < 2**22, "max_regions", "be < 2^22", max_regions)
        self.temperature, self.max_regions, self.negatives = float(temperature), max_regions, negatives
        self.normalize_first = flag(normalize_first, "normalize_first")
        self.num_samples = None if num_samples is None else whole(num_samples, "num_samples")
        self.same_samples, self.min_pixels = flag(same_samples, "same_samples"), whole(min_pixels, "min_pixels")
        self.detach_keys, self.symmetric = flag(detach_keys, "detach_keys"), flag(symmetric, "symmetric")
        self.check_finite, self.backend = flag(check_finite, "check_finite"), backend

    def forward(
        self,
        features_q: Tensor,  # [B, C, *S]
        features_k: Tensor,  # [B, C, *S]
        labels_q: Tensor,  # [B, *S]
        labels_k: Tensor | None = None,  # [B, *S]
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        shared = labels_k is None or labels_k is labels_q
        labels_k = labels_q if shared else labels_k
        self._check(features_q, features_k, labels_q, labels_k, shared)
        features_k = features_k.detach() if self.detach_keys else features_k
        sizes_q = self._sizes(features_q, labels_q)
        sizes_k = sizes_q if shared else self._sizes(features_k, labels_k)
        valid = (sizes_q >= self.min_pixels) & (sizes_k >= self.min_pixels)  # [B, R]
        if self.num_samples is not None:
            drawn = self._draw(labels_q, generator)
            labels_q, labels_k = drawn, drawn if shared and self.same_samples else self._draw(labels_k, generator)
        q, k = self._rows(features_q, labels_q, valid), self._rows(features_k, labels_k, valid)
        if self.negatives == "batch":
            q, k, valid = q.flatten(0, 1), k.flatten(0, 1), valid.flatten()
        losses = infonce(
            q, k, temperature=self.temperature, negatives="cross" if self.symmetric else "forward", valid_a=valid, backend=self.backend
        )  # fmt: skip
        return losses.sum() / ((2 if self.symmetric else 1) * valid.sum()).clamp(min=1)

    def _sizes(self, features, labels) -> Tensor:
        """Pixels of every region, [B, R]."""
        return pool(features[:, :1].detach(), labels, regions=self.max_regions, backend=self.backend)[1]

    def _rows(self, features, labels, valid) -> Tensor:
        """Unit mean [B, R, C] of every valid region, 0 for the others."""
        # What does not count is emptied before each normalisation: there a NaN would meet its gradient of 0.
        if self.normalize_first:
            slots = labels.flatten(1).long()
            known = (slots >= 0) & (slots < self.max_regions)
            known = known & valid.gather(1, torch.where(known, slots, 0))
            features = torch.where(known.reshape(labels.shape).unsqueeze(1), features.to(compute_dtype(features)), 0)
            features = F.normalize(features, dim=1)
        means, _ = pool(features, labels, regions=self.max_regions, backend=self.backend)
        return F.normalize(torch.where(valid.unsqueeze(2), means, 0), dim=2)

    def _draw(self, labels, generator) -> Tensor:
        """Labels, -1 at the pixels that were not drawn.

        One sort of (label, random key) an image brings the pixels of a region together in random order: the first `num_samples` stay.
        """
        flat = labels.flatten(1).long()  # [B, N]
        regions = self.max_regions
        slots = torch.where((flat >= 0) & (flat < regions), flat, regions)
        given = {} if generator is None else {"generator": generator}  # with dynamic shapes torch.compile refuses generator=None
        keys = torch.randint(2**RANDOM_BITS, slots.shape, device=labels.device, **given)
        keys, order = ((slots << RANDOM_BITS) + keys).sort(dim=1)
        slots = keys >> RANDOM_BITS
        every = torch.arange(regions + 1, device=labels.device).expand(slots.shape[0], -1).contiguous()
        first = torch.searchsorted(slots, every)  # [B, R + 1]: where each region begins
        rank = torch.arange(slots.shape[1], device=labels.device) - first.gather(1, slots)
        kept = torch.where((rank < self.num_samples) & (slots < regions), slots, -1)
        return torch.empty_like(kept).scatter(1, order, kept).reshape(labels.shape)

    def extra_repr(self) -> str:
        names = (
            "temperature", "max_regions", "normalize_first", "negatives", "num_samples", "same_samples", "min_pixels", "detach_keys", "symmetric", "backend"
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check(self, features_q, features_k, labels_q, labels_k, shared) -> None:
        expect_map(features_q, "features_q", least_axes=1)
        expect_like(features_k, "features_k", features_q, "features_q", same_space=shared)
        for name, labels, features in (("labels_q", labels_q, features_q), ("labels_k", labels_k, features_k)):
            expect_tensor(labels, name)
            if labels.dtype not in LABELS:
                raise TypeError(f"`{name}` must be uint8, int8, int16, int32 or int64, got {str(labels.dtype).removeprefix('torch.')}")
            if labels.shape != features.shape[:1] + features.shape[2:]:
                expect(False, name, f"have shape {(features.shape[0], *features.shape[2:])}", tuple(labels.shape))
            expect_device(labels, name, features_q, "features_q")
        if self.num_samples is not None and self.same_samples:
            expect(shared, "labels_k", "be None with same_samples=True", "another label map")
        if self.check_finite:
            expect_finite(features_q, "features_q")
            expect_finite(features_k, "features_k")
