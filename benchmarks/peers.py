"""InfoNCE as others compute it, at their best settings: name -> function(a, b, negatives, temperature) -> mean loss. An absent one says why."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 4096  # rows of the chunked peer


def wide(s):
    """float32 of 16-bit similarities, as autocast's cross-entropy takes them; others as they are."""
    return s.float() if s.element_size() == 2 else s


def eager(a, b, negatives, temperature):
    """One product, cross-entropy both ways; NT-Xent fills the diagonal, the cheapest way to leave an anchor out."""
    n = len(a)
    if negatives == "cross":
        s, target = wide(a @ b.T / temperature), torch.arange(n, device=a.device)
        return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2
    z = torch.cat([a, b])
    s = wide(z @ z.T / temperature)
    s.fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n, device=a.device).roll(n))


def chunked(a, b, negatives, temperature):
    """Rows in chunks, each recomputed backward, so that memory is bounded."""
    n = len(a)
    sides = [(a, b, 0), (b, a, 0)] if negatives == "cross" else [(torch.cat([a, b]), torch.cat([a, b]), n)]

    def part(rows, columns, first, shift):
        s = wide(rows @ columns.T / temperature)
        here = torch.arange(first, first + len(rows), device=a.device)
        if shift:
            s = s.scatter(1, here.unsqueeze(1), -torch.inf)
        return F.cross_entropy(s, (here + shift) % len(columns), reduction="sum")

    total = sum(
        checkpoint(part, rows[first : first + CHUNK], columns, first, shift, use_reentrant=False)
        for rows, columns, shift in sides
        for first in range(0, len(rows), CHUNK)
    )
    return total / (2 * n)


def flex(a, b, negatives, temperature):
    """FlexAttention's logsumexp, differentiable: "cross" alone."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def one_way(q, k):
        _, aux = flex_attention(q[None, None], k[None, None], k[None, None], scale=1 / temperature, return_aux=AuxRequest(lse=True))
        return aux.lse[0, 0]

    positive = (a.float() * b.float()).sum(1) / temperature
    return (one_way(a, b) + one_way(b, a) - 2 * positive).mean() / 2


def memeff(a, b, negatives, temperature):
    """memeff 0.3.1, `stable=False`: its default returns another gradient than that of its loss. "cross" alone."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)(a, b)


def inf_cl(a, b, negatives, temperature):
    """inf-cl 1.2.1, its single-device kernel, both ways. "cross" alone."""
    from inf_cl import cal_flash_loss

    scale, d = 1 / temperature, a.shape[1]
    return (cal_flash_loss(a, b, scale=scale, head_dim=d).mean() + cal_flash_loss(b, a, scale=scale, head_dim=d).mean()) / 2


def available(device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """Peers that can run here, and the reason for each that cannot."""
    found: dict[str, Callable] = {"eager": eager, "chunked": chunked}
    absent = {}
    if device == "cuda":
        found["compile"] = torch.compile(eager, dynamic=False)
        found["flex"] = torch.compile(flex, dynamic=False)
    else:
        absent |= {name: "needs CUDA" for name in ("compile", "flex")}
    for name, package, peer in (("memeff", "memeff", memeff), ("inf-cl", "inf_cl", inf_cl)):
        if device != "cuda":
            absent[name] = "needs CUDA"
        elif importlib.util.find_spec(package) is None:
            absent[name] = f"{package} is not installed"
        else:
            found[name] = peer
    return found, absent


CROSS_ONLY = {"flex", "memeff", "inf-cl"}
