"""Signs of collapse, from a few hundred matching rows of features (alignment, uniformity: Wang and Isola, arXiv 2005.10242)."""

import torch
import torch.nn.functional as F
from torch import Tensor

DEAD = 0.01  # of 1/sqrt(D), the deviation of a dimension when unit rows are spread over the sphere


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
