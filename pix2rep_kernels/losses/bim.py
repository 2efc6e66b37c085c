"""BIM: boundary-aware information maximisation of cluster maps (arXiv 2202.02371, MedIA 2024), with IIC's variants (Ji et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep_kernels.check import checked_mask, expect, expect_choice, expect_device, expect_float
from pix2rep_kernels.dispatch import CHOICES
from pix2rep_kernels.losses.common import compute_dtype, expect_finite, expect_like, expect_map, flag, number, weight, whole
from pix2rep_kernels.ops.entropy import entropy
from pix2rep_kernels.ops.joint import joint
from pix2rep_kernels.ops.lncc import lncc

EPS_MODES = ("add", "clamp")
BOUNDARY_ON = ("both", "first", "second")
Logits = Tensor | list[Tensor] | tuple[Tensor, ...]


class BoundaryInfoMaxLoss(nn.Module):
    """Two cluster maps of one image shall agree, use all clusters, and be uncertain where the image has edges.

        P    = (1/M) sum_p softmax(logits_1)_p softmax(logits_2)_p^T, made symmetric;  p, q its marginals
        T    = alpha I/K + (1 - alpha) P
        RR   = -sum_ij T_ij log(P_ij + eps) + lamda sum_ij P_ij [log(p_i + eps) + log(q_j + eps)]
        H    = entropy of the softmax at a pixel (`entropy`);  I = (H - min H) / (max H - min H + 1e-6), min and max of an image, without gradient
        e    = mean over channels of sqrt(sum_axis (x - roll(x, 1, axis))^2), x the image;  J = ((e - min e) / (max e - min e + 1e-6))^power
        CC   = -mean_p lncc(I, J)_p, the mean over both maps
        loss = mean over the heads of information_weight RR + boundary_weight CC

    alpha = 0, lamda = 1 is minus the mutual information (IIC), up to eps. A window not positively correlated with the edges gives CC next to no gradient.

    Official code: every default but alpha, lamda and boundary_weight, which its scripts vary (0.5, 1, 1 in the only one with single values); 40 clusters in
    3 linear heads; power 0.75 for ACDC and MMWHS, 0.5 for prostate and spleen. Inferred: 3D, `mask`, and how the image is resized (half-pixel centres).
    IIC's official code: alpha=0, boundary_weight=0, radius > 0, eps=2.2e-16, eps_mode="clamp", `mask`
    (it detaches the sum that normalises P too, which changes nothing: that is a number of pixels).

    Args:
        alpha: share of the diagonal in the target T, 0 (mutual information) to 1 (balanced and consistent clusters).
        lamda: weight >= 0 of the marginals' entropies.
        boundary_weight, information_weight: weights >= 0 of CC and RR; a term of weight 0 is not computed.
        window: odd side of CC's window, in pixels.
        power: > 0, of the edge map.
        radius, collapsed: displacements of the joint distribution, as in `joint`. Not collapsed: one RR a displacement, their mean.
        symmetric: make P symmetric. Which map comes first matters to RR in neither case.
        detach_target: no gradient through T (official: it has one).
        eps, eps_mode: "add": inside the logarithms, as above; "clamp": P, p and q themselves are raised to eps, without gradient below it.
        wrap: the edge map's differences wrap around the image (official: rows and columns 0 then show an edge that is none); False: they are 0 there.
        boundary_on: the maps that CC looks at, "both" (official), "first" or "second".
        check_finite: raise on NaN or inf input, naming the argument; reads a value back from the device, so it stops CUDA graphs and fullgraph.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Shape:
        logits_1, logits_2: [B, K, *S] with 2 or 3 spatial axes, or a list of them, one a head (K may differ), of pixels that correspond: one floating dtype and
            device, any strides.
        image: [B, channels, *S'], floating, the one that the second view saw: its edges are computed once for all heads, at S' = S, after (bi- or tri-)linear
            resizing where S' differs. It gets no gradient. None where boundary_weight is 0.
        mask: [B, *S] or [B, 1, *S] bool: pixels that count. The others are as if outside the image (0 in CC's windows, no edge towards them) and get gradient
            exactly 0, whatever logits and, at S' = S, image hold there.
        output: scalar, float32 (float64 for float64 logits); 0 when no pixel counts.

    Raises:
        ValueError, TypeError: an argument is off; the message names argument, expectation and value.

    Example:
        >>> loss = BoundaryInfoMaxLoss()([head(warp(features)) for head in heads], [head(features_t) for head in heads], image_t)
    """

    def __init__(
        self,
        alpha: float = 0.5,
        lamda: float = 1.0,
        boundary_weight: float = 1.0,
        window: int = 5,
        power: float = 0.75,
        *,
        information_weight: float = 1.0,
        radius: int = 0,
        collapsed: bool = True,
        symmetric: bool = True,
        detach_target: bool = False,
        eps: float = 1e-5,
        eps_mode: str = "add",
        wrap: bool = True,
        boundary_on: str = "both",
        check_finite: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        expect(0 <= number(alpha, "alpha") <= 1, "alpha", "be in [0, 1]", alpha)
        expect(whole(window, "window") % 2 == 1, "window", "be odd and > 0", window)
        expect(0 < number(power, "power") < float("inf"), "power", "be > 0 and finite", power)
        expect(1e-30 <= number(eps, "eps") < 1, "eps", "be in [1e-30, 1)", eps)
        expect_choice(eps_mode, "eps_mode", EPS_MODES)
        expect_choice(boundary_on, "boundary_on", BOUNDARY_ON)
        expect_choice(backend, "backend", CHOICES)
        self.alpha, self.lamda, self.window, self.power = float(alpha), weight(lamda, "lamda"), window, float(power)
        self.boundary_weight = weight(boundary_weight, "boundary_weight")
        self.information_weight = weight(information_weight, "information_weight")
        self.radius, self.collapsed, self.symmetric = whole(radius, "radius", 0), flag(collapsed, "collapsed"), flag(symmetric, "symmetric")
        self.detach_target = flag(detach_target, "detach_target")
        self.eps, self.eps_mode, self.wrap, self.boundary_on = float(eps), eps_mode, flag(wrap, "wrap"), boundary_on
        self.check_finite, self.backend = flag(check_finite, "check_finite"), backend

    def forward(
        self,
        logits_1: Logits,  # [B, K, *S], or one a head
        logits_2: Logits,  # [B, K, *S], or one a head
        image: Tensor | None = None,  # [B, channels, *S']
        *,
        mask: Tensor | None = None,  # [B, *S] or [B, 1, *S]
    ) -> Tensor:
        heads, mask = self._check(logits_1, logits_2, image, mask)
        like = heads[0][0]
        loss = like.new_zeros((), dtype=compute_dtype(like))
        if self.information_weight:
            options = {"radius": self.radius, "collapsed": self.collapsed, "symmetric": self.symmetric, "backend": self.backend}
            found = [self._information(joint(a, b, mask=mask, **options)) for a, b in heads]
            loss = loss + self.information_weight * torch.stack(found).mean()
        if self.boundary_weight:
            edges = edge_map(resized(image, like), self.power, self.wrap, mask)
            looked_at = [maps for maps, which in ((0, "first"), (1, "second")) if self.boundary_on in ("both", which)]
            found = [self._boundary(pair[k], edges, mask) for pair in heads for k in looked_at]
            loss = loss + self.boundary_weight * torch.stack(found).mean()
        return loss if mask is None else torch.where(mask.any(), loss, 0)

    def _information(self, p: Tensor) -> Tensor:
        """RR of p [K, K] or, one a displacement and their mean, [displacements, K, K]."""
        marginals = p.sum(-1, keepdim=True), p.sum(-2, keepdim=True)
        if self.eps_mode == "clamp":
            p = p.clamp(min=self.eps)
            log_p, *logs = (t.clamp(min=self.eps).log() for t in (p, *marginals))
        else:
            log_p, *logs = ((t + self.eps).log() for t in (p, *marginals))
        k = p.shape[-1]
        target = self.alpha / k * torch.eye(k, dtype=p.dtype, device=p.device) + (1 - self.alpha) * p
        target = target.detach() if self.detach_target else target
        return (self.lamda * p * (logs[0] + logs[1]) - target * log_p).sum((-2, -1)).mean()

    def _boundary(self, logits, edges, mask) -> Tensor:
        uncertainty = unit_range(entropy(logits, mask=mask, backend=self.backend), mask)
        cc = lncc(uncertainty, edges, window=self.window, backend=self.backend)
        if mask is None:
            return -cc.mean()
        return -torch.where(mask.unsqueeze(1), cc, 0).sum() / mask.sum().clamp(min=1)

    def extra_repr(self) -> str:
        names = (
            "alpha", "lamda", "boundary_weight", "window", "power", "information_weight", "radius", "collapsed", "symmetric", "detach_target", "eps",
            "eps_mode", "wrap", "boundary_on", "backend",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check(self, logits_1, logits_2, image, mask) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        single = isinstance(logits_1, Tensor), isinstance(logits_2, Tensor)
        for name, logits, alone in (("logits_1", logits_1, single[0]), ("logits_2", logits_2, single[1])):
            if not alone and not isinstance(logits, (list, tuple)):
                raise TypeError(f"`{name}` must be a torch.Tensor or a list of them, got {type(logits).__name__}")
        maps_1, maps_2 = ([logits] if alone else list(logits) for logits, alone in zip((logits_1, logits_2), single, strict=True))
        expect(single[0] == single[1], "logits_2", "be a tensor or a list as `logits_1` is", type(logits_2).__name__)
        expect(len(maps_1) > 0, "logits_1", "hold at least one head", "none")
        expect(len(maps_1) == len(maps_2), "logits_2", f"hold {len(maps_1)} heads as `logits_1` does", len(maps_2))
        for k, (a, b) in enumerate(zip(maps_1, maps_2, strict=True)):
            at = "" if single[0] else f"[{k}]"
            expect_map(a, f"logits_1{at}")
            expect_like(b, f"logits_2{at}", a, f"logits_1{at}")
            if k and (a.shape[0] != maps_1[0].shape[0] or a.shape[2:] != maps_1[0].shape[2:]):
                expect(False, f"logits_1{at}", f"have the batch and space of logits_1[0] {tuple(maps_1[0].shape)}", tuple(a.shape))
        like = maps_1[0]
        if image is not None or self.boundary_weight:
            self._check_image(image, like)
        if self.check_finite:
            for name, maps in (("logits_1", maps_1), ("logits_2", maps_2), ("image", [] if image is None else [image])):
                for tensor in maps:
                    expect_finite(tensor, name)
        return list(zip(maps_1, maps_2, strict=True)), None if mask is None else checked_mask(mask, like, "logits_1")

    def _check_image(self, image, like) -> None:
        expect_float(image, "image")
        if image.ndim != like.ndim or image.shape[0] != like.shape[0]:
            expect(False, "image", f"have shape [{like.shape[0]}, channels, *S'] with {like.ndim - 2} spatial axes", tuple(image.shape))
        if image.numel() == 0:
            expect(False, "image", "have at least one pixel and channel", tuple(image.shape))
        expect_device(image, "image", like, "logits_1")


def resized(image: Tensor, like: Tensor) -> Tensor:
    """`image` without gradient, in the compute dtype of the map `like` and at its size."""
    image = image.detach().to(compute_dtype(like))
    if image.shape[2:] == like.shape[2:]:
        return image
    return F.interpolate(image, size=like.shape[2:], mode="bilinear" if like.ndim == 4 else "trilinear", align_corners=False)


def edge_map(image: Tensor, power: float, wrap: bool = True, mask: Tensor | None = None) -> Tensor:
    """J [B, 1, *S] in [0, 1] of image [B, channels, *S] (see BoundaryInfoMaxLoss); mask [B, *S]."""
    squares = torch.zeros_like(image)
    for axis in range(2, image.ndim):
        before = image.roll(1, axis) if wrap else torch.cat([image.narrow(axis, 0, 1), image.narrow(axis, 0, image.shape[axis] - 1)], axis)
        difference = image - before
        if mask is not None:
            difference = torch.where((mask & mask.roll(1, axis - 1)).unsqueeze(1), difference, 0)
        squares = squares + difference.square()
    return unit_range(squares.sqrt().mean(1, keepdim=True), mask).pow(power)


def unit_range(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x [B, 1, *S] taken to [0, 1] in each image, min and max without gradient; 0 outside mask [B, *S], which min and max do not look at either."""
    axes = tuple(range(1, x.ndim))
    given = x.detach()
    if mask is None:
        low, high = given.amin(axes, keepdim=True), given.amax(axes, keepdim=True)
        return (x - low) / (high - low + 1e-6)
    counts = mask.unsqueeze(1)
    low = torch.where(counts, given, torch.inf).amin(axes, keepdim=True)
    high = torch.where(counts, given, -torch.inf).amax(axes, keepdim=True)
    return torch.where(counts, (x - low) / (high - low + 1e-6), 0)
