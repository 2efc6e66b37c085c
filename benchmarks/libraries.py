"""Losses of other libraries as peers on a CPU or GPU: name -> Peer, or the reason why it cannot run here. Versions are what `pip install .[peers]` gives."""

import contextlib
import functools
import importlib.util
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Peer


@contextlib.contextmanager
def torchvision_without_kernels():
    """torchvision wheels built for another torch register fakes of operators that did not load, and raise; the losses need none of them."""
    register = torch.library.register_fake

    def tolerant(op, *arguments, **options):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return arguments[0] if arguments else lambda function: function
        return register(op, *arguments, **options)

    torch.library.register_fake = tolerant
    try:
        yield
    finally:
        torch.library.register_fake = register


def why_not(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def at_first_call(make: Callable) -> Callable:
    """A loss of a library that is imported, in seconds, when it is first called; where its import fails, the call says so."""

    @functools.cache
    def made():
        with torchvision_without_kernels():
            return make()

    return lambda *rows: made()(*rows)


def why_no_compiler(device: str) -> str | None:
    """Why torch.compile has no code generator here."""
    return "torch.compile needs g++ on a CPU" if device == "cpu" and shutil.which("g++") is None else None


def normalised(call):
    """`call` of L2-normalised rows: what a library computes that normalises by itself."""
    return lambda a, b: call(F.normalize(a), F.normalize(b))


def lightly_nt_xent(temperature: float):
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)


def monai_nt_xent(temperature: float):
    from monai.losses import ContrastiveLoss

    return ContrastiveLoss(temperature=temperature)


def metric_learning_nt_xent(temperature: float):
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=temperature))


def keops(negatives: str, temperature: float):
    """KeOps's streamed logsumexp; NT-Xent's own diagonal is taken out of the sum afterwards, exactly."""

    def lse(x: Tensor, y: Tensor) -> Tensor:
        from pykeops.torch import Vi, Vj

        return ((Vi(x.contiguous()) | Vj(y.contiguous())) / temperature).logsumexp(1)[:, 0]

    def call(a, b):
        positive = (a * b).sum(1) / temperature
        if negatives == "cross":
            return (lse(a, b) + lse(b, a) - 2 * positive).mean() / 2
        z = torch.cat([a, b])
        whole = lse(z, z)
        return (whole + torch.log1p(-torch.exp((z * z).sum(1) / temperature - whole)) - positive.repeat(2)).mean()

    return call


def published_pix2rep(temperature: float):
    """Pix2Rep's own formula: the positive in column 0, then the negatives of each row, and a cross-entropy of class 0."""

    def call(a, b):
        n, z = len(a), torch.cat([a, b])
        s = z @ z.T
        own = torch.eye(2 * n, dtype=torch.bool, device=z.device)
        match = own.roll(n, 1)
        logits = torch.cat([s[match].view(2 * n, 1), s[~(match | own)].view(2 * n, -1)], 1) / temperature
        return F.cross_entropy(logits, torch.zeros(2 * n, dtype=torch.long, device=z.device))

    return call


def infonce(eager, negatives: str, n: int, d: int, temperature: float, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers of InfoNCE over n pairs of d features in float32, and the reasons for those that are missing.

    Bytes are those of a step: so many matrices of (2n)^2, of (2n)^2 d (MONAI broadcasts) or of (2n)^3 (pytorch-metric-learning enumerates pairs of pairs).
    """
    square = 4.0 * (2 * n) ** 2
    found, absent = {}, {}
    if negatives == "joint":
        found["Pix2Rep's formula"] = Peer(published_pix2rep(temperature), bytes=7.5 * square)
        for name, package, make, size in (
            ("lightly", "lightly", lightly_nt_xent, 4.25 * square),
            ("MONAI", "monai", monai_nt_xent, 6.2 * square * d),
            ("metric-learning", "pytorch_metric_learning", metric_learning_nt_xent, 4 * square * 2 * n),
        ):
            if reason := why_not(package):
                absent[name] = reason
            else:
                found[name] = Peer(at_first_call(functools.partial(make, temperature)), bytes=size, truth=normalised(eager))
    if reason := why_not("pykeops"):
        absent["KeOps"] = reason
    else:
        found["KeOps"] = Peer(keops(negatives, temperature), slow_start=True)
    return found, absent


def lightly_barlow(weight: float):
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss(lambda_param=weight)


def monai_barlow(weight: float):
    from monai.losses import BarlowTwinsLoss

    return BarlowTwinsLoss(lambd=weight)


def barlow(eager_std, weight: float) -> tuple[dict[str, Peer], dict[str, str]]:
    """Barlow Twins of lightly (biased variance: "batchnorm") and of MONAI (unbiased deviation: "std", `eager_std`)."""
    found, absent = {}, {}
    if reason := why_not("lightly"):
        absent["lightly"] = reason
    else:
        found["lightly"] = Peer(at_first_call(functools.partial(lightly_barlow, weight)))
    if reason := why_not("monai"):
        absent["MONAI"] = reason
    else:
        found["MONAI"] = Peer(at_first_call(functools.partial(monai_barlow, weight)), truth=eager_std)
    return found, absent

