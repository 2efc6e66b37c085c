"""Options of one method each; `config.LossConfig` holds what methods share. Where a paper's code or text gives a value, the comment says so."""

from dataclasses import dataclass
from typing import Literal

Checks = list[tuple[bool, str, str]]  # (holds, key, expectation)


@dataclass
class BimConfig:
    """Boundary-aware information maximisation (arXiv 2202.02371). "Official": read from its code."""

    heads: int = 3  # official; their losses are averaged
    clusters: int = 40  # official, a head; its scripts try 20, 40, 60
    head: Literal["linear", "mlp"] = "linear"  # official: linear; "mlp": 1x1 conv to head_hidden, LeakyReLU, 1x1 conv
    head_hidden: int = 64  # official
    alpha: float = 0.5  # official, where it has one value: 0 mutual information, 1 balanced and consistent clusters
    lamda: float = 1.0  # official: weight of the marginals' entropies
    information_weight: float = 1.0  # official
    boundary_weight: float = 1.0  # official, where it has one value; its scripts try 0 to 2
    window: int = 5  # official, pixels
    power: float = 0.75  # of the edges; official for ACDC and MMWHS, 0.5 for prostate and spleen
    outside: Literal["keep", "drop"] = "keep"  # official: "keep", features that T took from outside are 0 and count
    crop_rotation: float = 45.0  # degrees, U(-r, r), of both views alike; official for ACDC
    crop_scale: tuple[float, float] = (0.8, 1.0)  # share of the image's side; inferred (official: 224 pixels, whatever the slice's size)
    crop_flip: float = 0.5  # official: probability of a flip, for each axis
    jitter: tuple[float, float] = (0.5, 1.5)  # brightness and contrast, U each, a view its own; official for ACDC (its order is random)
    rotation: float = 45.0  # of T, degrees, U(-r, r); official, as the next four
    scale: tuple[float, float] = (0.8, 1.3)  # of T: above 1 zooms in
    translation: float = 0.1  # of T, share of half the image, U(-t, t) for each axis
    mirror: float = 0.9  # of T: probability for each axis (that each axis has its own draw is inferred)
    gamma: tuple[float, float] = (0.5, 2.0)  # of the transformed view's intensities, U
    encoder_weight: float = 0.0  # of InfoNCE at the bottleneck: official in one script (1); unknown whether the paper's tables have it
    encoder_hidden: int = 256  # official: MLP 256-256
    encoder_projection: int = 256
    temperature: float = 0.07  # official, of that InfoNCE
    partitions: int = 3  # official for ACDC: slices of the same third of a volume are each other's positives
    encoder_images: int = 50  # the most of a batch that are contrasted; official: its batches have no more

    def checks(self) -> Checks:
        at_least = {
            0: "lamda information_weight boundary_weight crop_rotation rotation translation encoder_weight",
            1: "heads head_hidden window encoder_hidden encoder_projection partitions",
            2: "clusters encoder_images",
        }
        return [
            *((getattr(self, key) >= bound, key, f"at least {bound}") for bound, keys in at_least.items() for key in keys.split()),
            *((0 <= getattr(self, key) <= 1, key, "in [0, 1]") for key in ("alpha", "crop_flip", "mirror")),
            *((0 < low <= high, key, "SMALLEST,LARGEST with 0 < SMALLEST <= LARGEST") for key in _RANGES for low, high in [getattr(self, key)]),
            (self.window % 2 == 1, "window", "odd"),
            (self.power > 0, "power", "above 0"),
            (self.temperature >= 0.01, "temperature", "at least 0.01"),
        ]


_RANGES = ("crop_scale", "jitter", "scale", "gamma")


@dataclass
class LrcConfig:
    """Localized Region Contrast (arXiv 2304.03406). No code was found: all but Felzenszwalb's superpixels and the two losses is inferred."""

    superpixel_scale: float = 100.0  # of images in [0, 1]; larger makes larger superpixels
    superpixel_sigma: float = 0.8  # blur before, pixels
    superpixel_min_size: int = 20  # pixels; smaller ones are merged with a neighbour
    superpixel_spacing: bool = False  # 3D: the blur is as wide in mm along every axis; false: in voxels
    background: float = 0.05  # superpixels with a lower mean intensity, of [0, 1], are dropped; 0: none
    min_pixels: int = 10  # a region with fewer in either view is dropped
    max_regions: int = 256  # an image; of more, the largest stay
    warp: bool = True  # the key's view and superpixels go through a transform of `spatial`; false: views differ in intensities alone
    num_samples: int | None = 50  # pixels drawn a region, in each view; null: every pixel
    same_samples: bool = False  # the same draw in both views; needs warp=false
    normalize_first: bool = False  # pixels to unit length before their mean
    negatives: Literal["image", "batch"] = "image"
    symmetric: bool = False  # contrast keys with queries too
    keys: Literal["momentum", "online"] = "momentum"  # of regions: of the moving average, without gradient, or of the network itself, with it
    temperature: float = 0.1  # of regions
    local_weight: float = 1.0
    global_weight: float = 1.0
    global_temperature: float = 0.07  # MoCo's
    global_hidden: int = 256  # MLP on the pooled bottleneck, as in MoCo v2
    global_projection: int = 128  # MoCo's
    queue: int = 4096  # keys of earlier batches, negatives of the global loss; MoCo's 65536 suits millions of slices
    own_keys: Literal["drop", "keep"] = "drop"  # older keys of the query's own image in the queue: no negatives, or ("keep", MoCo's) as all others
    momentum: float = 0.999  # MoCo's, of the moving average, a step

    def checks(self) -> Checks:
        positive = ("superpixel_min_size", "min_pixels", "max_regions", "num_samples", "global_hidden", "global_projection", "queue")
        weights = ("superpixel_scale", "superpixel_sigma", "background", "local_weight", "global_weight")
        return [
            *(((value := getattr(self, key)) is None or value >= 1, key, "at least 1") for key in positive),
            *((getattr(self, key) >= 0, key, "at least 0") for key in weights),
            *((getattr(self, key) >= 0.01, key, "at least 0.01") for key in ("temperature", "global_temperature")),
            (self.max_regions < 2**22, "max_regions", "below 2^22"),
            (self.local_weight + self.global_weight > 0, "local_weight", "above 0 where global_weight is 0"),
            (not (self.same_samples and self.warp), "same_samples", "false with lrc.warp: warped pixels are others"),
            (0 <= self.momentum <= 1, "momentum", "in [0, 1]"),
        ]


@dataclass
class PglConfig:
    """PGL (arXiv 2011.12640), 3D only. No code was published. "Read": by a third party, in the paper; "theirs": that party's own choice; the rest
    is inferred.
    """

    crop_scale: tuple[float, float] = (1.1, 1.4)  # read: a crop's side over data.size, U for each axis; it is then resized to data.size
    depth: Literal["same", "free"] = "same"  # theirs: "same", both crops show the same slices, unscaled; "free": z is treated as y and x are
    min_overlap: float = 0.1  # read
    overlap_of: Literal["union", "smaller"] = "union"  # theirs: the share is of the two boxes' union; or of the smaller box
    flip: tuple[float, float, float] = (0.5, 0.5, 0.5)  # read: probabilities along z, y, x, drawn for each crop
    noise_variance: float = 0.1  # read: U(0, v) where intensities have a standard deviation of 1
    noise_unit: float = 0.25  # what that standard deviation is taken to be of intensities in [0, 1]
    noise_p: float = 0.1  # read
    blur_sigma: tuple[float, float] = (0.5, 1.0)  # read: voxels, U
    blur_p: float = 0.2  # read
    contrast: tuple[float, float] = (0.75, 1.25)  # read: intensities times U, then clipped
    contrast_p: float = 0.5  # read
    gamma: tuple[float, float] = (0.7, 1.5)  # read: U
    gamma_p: float = 0.5  # read
    where: Literal["encoder", "decoder"] = "encoder"  # maps that shall agree: the encoder's last one, or the decoder's full-resolution one
    head_hidden: int = 4096  # theirs: 1x1x1 conv, batch norm, ReLU, 1x1x1 conv; projector and predictor alike
    projection: int = 256  # theirs
    predictor: bool = True  # false: the projection itself is compared, and little keeps features from collapsing
    norm: Literal["channel", "flat", "none"] = "channel"  # of each voxel's features; theirs: "flat", of the whole map; "none": mean squares
    align: Literal["after", "before"] = "after"  # maps are interpolated after the heads, or before them
    mode: Literal["linear", "nearest"] = "linear"  # that interpolation; half-pixel centres
    points: tuple[int, ...] | None = None  # D, H, W of the grid on the common region; null: a map's own size
    symmetric: bool = True  # theirs: the loss with the two views swapped is added
    global_weight: float = 0.0  # of BYOL's loss between the mean features of two crops, with heads of its own; 0: none
    momentum: float = 0.99  # of the target (theirs: 0.999 throughout), from here ...
    momentum_end: float = 1.0  # ... to here along half a cosine

    def checks(self) -> Checks:
        ranges = {key: getattr(self, key) for key in ("crop_scale", "blur_sigma", "contrast", "gamma")}
        return [
            *((0 < low <= high, key, "SMALLEST,LARGEST with 0 < SMALLEST <= LARGEST") for key, (low, high) in ranges.items()),
            *((0 <= getattr(self, key) <= 1, key, "in [0, 1]") for key in ("min_overlap", "noise_p", "blur_p", "contrast_p", "gamma_p")),
            *((0 <= getattr(self, key) <= 1, key, "in [0, 1]") for key in ("momentum", "momentum_end")),
            *((getattr(self, key) >= 0, key, "at least 0") for key in ("noise_variance", "noise_unit", "global_weight")),
            *((getattr(self, key) >= 1, key, "at least 1") for key in ("head_hidden", "projection")),
            (all(0 <= p <= 1 for p in self.flip), "flip", "three probabilities"),
            (self.points is None or (len(self.points) == 3 and min(self.points) >= 1), "points", "three numbers of at least 1, or null"),
        ]


@dataclass
class SimclrConfig:
    """SimCLR (arXiv 2002.05709). "Paper's": stated there, for photographs; views are those of `spatial` and `photometric`."""

    temperature: float = 0.1  # paper's best for ImageNet
    head_hidden: int = 256  # of an MLP on the pooled bottleneck, one hidden layer (paper's: as wide as its input, 2048)
    projection: int = 128  # paper's
    positives: Literal["image", "position"] = "image"  # "position": slices of the same part of their volumes too; 2D only
    partitions: int = 3  # of a volume, where positives are by position

    def checks(self) -> Checks:
        at_least = {1: ("head_hidden", "projection"), 2: ("partitions",)}
        return [
            *((getattr(self, key) >= bound, key, f"at least {bound}") for bound, keys in at_least.items() for key in keys),
            (self.temperature >= 0.01, "temperature", "at least 0.01"),
        ]
