"""Linear probe: one 1x1 layer on the features of a frozen backbone."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

MAX_PIXELS = 2**22  # labelled pixels kept: 512 MiB of float32 at 32 features
PIXELS_A_STEP = 2**13  # drawn from all labelled slices: to a linear layer a better batch than a few whole slices


def at_once(images: torch.Tensor) -> int:
    """How many images [N, 1, *S] go through a network together: a patch of a volume weighs as much as many slices."""
    return 32 if images.ndim == 4 else 2


@torch.no_grad()
def features(backbone, images: torch.Tensor, batch_size: int | None = None):
    """Yield features [b, C, *S] of images [N, 1, *S], batch by batch, with the backbone in eval mode."""
    backbone.eval()
    batch_size = batch_size or at_once(images)
    for start in range(0, len(images), batch_size):
        yield backbone(images[start : start + batch_size])


@torch.no_grad()
def labelled_pixels(backbone, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
    """Feature rows [P, C] and labels [P] of at most MAX_PIXELS pixels of images [N, 1, *S], labels int64 [N, *S]."""
    share = min(1.0, MAX_PIXELS / labels.numel())
    rows, targets = [], []
    for start, maps in zip(range(0, len(images), at_once(images)), features(backbone, images), strict=True):
        flat, target = maps.movedim(1, -1).flatten(0, -2), labels[start : start + len(maps)].flatten()
        if share < 1:
            keep = torch.randperm(len(flat), generator=generator)[: int(share * len(flat))].to(flat.device)
            flat, target = flat[keep], target[keep]
        rows.append(flat)
        targets.append(target)
    return torch.cat(rows), torch.cat(targets)


def class_weights(kind: str, targets: torch.Tensor, classes: int) -> torch.Tensor:
    """Cross-entropy weights [classes + 1]: "none": ones; "balanced": inverse frequency; "sqrt": its root. Mean 1 over the classes present;
    absent ones get 1.
    """
    if kind not in ("none", "sqrt", "balanced"):
        raise ValueError(f'downstream.class_weights must hold "none", "sqrt" or "balanced", got {kind!r}')
    counts = torch.bincount(targets, minlength=classes + 1).double()
    power = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}[kind]
    weights = counts.clamp_min(1).pow(-power)
    weights = weights / weights[counts > 0].mean()
    return torch.where(counts > 0, weights, 1.0).float()


@contextlib.contextmanager
def _one_thread():
    """Operations of half a millisecond gain little from a second CPU thread, and wait long for it where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit(rows: torch.Tensor, targets: torch.Tensor, classes: int, config, seed: int) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    """Train one linear layer for each learning rate and class weighting of `config` (DownstreamConfig), side by side on the same batches.

    rows [P, C]; targets int64 [P] in 0..classes. The loss is weighted cross-entropy plus soft Dice over the classes (background left out);
    AdamW, cosine. Rows are standardised feature by feature inside, and the layers that come back undo it: they act on raw features.
    Returns (settings, weight [G, classes + 1, C], bias [G, classes + 1]), one entry a setting.
    """
    settings = [{"lr": lr, "class_weights": kind} for lr in config.probe_lr for kind in config.class_weights]
    if not settings:
        raise ValueError(
            f"downstream.probe_lr and downstream.class_weights must not be empty, got {config.probe_lr} and {config.class_weights}"
        )
    mean = rows.mean(0)
    deviation = rows.std(0).clamp_min(1e-6 * rows.std().clamp_min(1e-6))  # a dead feature stays dead
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(classes + 1, rows.shape[1], generator=generator)
    kinds = len(config.class_weights)
    layers = []  # a learning rate: weight [kinds, K + 1, C], bias [kinds, K + 1, 1]
    for _ in config.probe_lr:
        weight = start.expand(kinds, -1, -1).to(rows.device, copy=True)
        layers.append([weight.requires_grad_(), weight.new_zeros(kinds, classes + 1, 1).requires_grad_()])
    groups = [{"params": layer, "lr": lr} for layer, lr in zip(layers, config.probe_lr, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.probe_steps)
    weights = torch.stack([class_weights(setting["class_weights"], targets, classes) for setting in settings])
    with _one_thread():
        for _ in range(config.probe_steps):
            picked = torch.randint(len(rows), (min(PIXELS_A_STEP, len(rows)),), generator=generator).to(rows.device)
            x = ((rows[picked] - mean) / deviation).T  # [C, P]
            weight, bias = (torch.cat(parts) for parts in zip(*layers, strict=True))
            loss = _loss(weight @ x + bias, targets[picked], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        weight, bias = (torch.cat(parts) for parts in zip(*layers, strict=True))
        weight = weight / deviation
        return settings, weight, bias.squeeze(-1) - weight @ mean


def _loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over G settings of their loss: they share no parameter, so each gets its own gradient.

    logits [G, K + 1, P] (pixels last: the softmax is then over whole vectors), targets [P], weights [G, K + 1].
    """
    log_p = F.log_softmax(logits, 1)
    truth = F.one_hot(targets, logits.shape[1]).T.to(logits.dtype)  # [K + 1, P]
    counts = truth.sum(1)
    cross_entropy = -(weights * (log_p * truth).sum(-1)).sum(1) / (weights * counts).sum(1)
    p = log_p.exp()
    soft_dice = (2 * (p * truth).sum(-1) + 1e-5) / (p.sum(-1) + counts + 1e-5)
    return (cross_entropy + 1 - soft_dice[:, 1:].mean(1)).sum()


@torch.no_grad()
def predict_all(backbone, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """Labels of every setting at once: images [N, 1, *S], weight [G, K + 1, C], bias [G, K + 1] -> uint8 [G, N, *S]."""
    out = []
    for maps in features(backbone, images):
        logits = torch.einsum("gkc,bc...->gbk...", weight, maps) + bias[:, None, :].reshape(*bias.shape[:1], 1, -1, *[1] * (maps.ndim - 2))
        out.append(logits.argmax(2).to(torch.uint8).cpu())
    return torch.cat(out, 1).numpy()
