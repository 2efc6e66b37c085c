"""Signs of collapse, from some matching rows of features (alignment, uniformity: Wang and Isola, arXiv 2005.10242) or of cluster logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

DEAD = 0.01  # of 1/sqrt(D), the deviation of a dimension when unit rows are spread over the sphere
PIXELS = 4096  # that `clustering` looks at


@torch.no_grad()
def collapse(rows_1: Tensor, rows_2: Tensor) -> dict[str, float]:
    """Statistics of matching rows [P, D] (any length: they are normalised here), P >= 2; all NaN for fewer.

    alignment: mean squared distance of the two rows of a pair; 0 the same, 2 unrelated.
    uniformity: log of the mean of exp(-2 squared distance) over pairs of different rows; 0 collapsed to a point, near -4 spread out.
    dead_dimensions: how many of D hardly vary, deviation under 1 % of 1/sqrt(D).
    """
    if len(rows_1) < 2:
        return dict.fromkeys(("alignment", "uniformity", "dead_dimensions"), float("nan"))
    rows_1, rows_2 = F.normalize(rows_1.float(), dim=1), F.normalize(rows_2.float(), dim=1)
    alignment = (rows_1 - rows_2).square().sum(1).mean()
    uniformity = torch.pdist(rows_2).square().mul(-2).exp().mean().log()
    dead = (rows_2.std(dim=0) < DEAD * rows_2.shape[1] ** -0.5).sum()
    alignment, uniformity, dead = torch.stack([alignment, uniformity, dead.float()]).tolist()
    return {"alignment": alignment, "uniformity": uniformity, "dead_dimensions": dead}


@torch.no_grad()
def clustering(logits_1: list[Tensor], logits_2: list[Tensor]) -> dict[str, float]:
    """Statistics of matching cluster maps, one pair [B, K, *S] a sub-head, means over the sub-heads; of evenly spaced pixels.

    assignment_entropy: of the mean softmax, nats; log K when all clusters are used alike, 0 collapsed to one.
    pixel_entropy: mean over pixels of the softmax's entropy, nats; 0 sure, log K when it tells nothing.
    agreement: share of pixels whose likeliest cluster is the same in both maps.
    """
    found = []
    for pair in zip(logits_1, logits_2, strict=True):
        rows = [logits.movedim(1, -1).flatten(0, -2) for logits in pair]
        p_1, p_2 = (r[:: max(1, len(r) // PIXELS)].float().softmax(1) for r in rows)
        both = torch.cat([p_1, p_2])
        agreement = (p_1.argmax(1) == p_2.argmax(1)).float().mean()
        found.append(torch.stack([_entropy(both.mean(0)), _entropy(both).mean(), agreement]))
    return dict(zip(("assignment_entropy", "pixel_entropy", "agreement"), torch.stack(found).mean(0).tolist(), strict=True))


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
