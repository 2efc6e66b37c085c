"""Optimisers by name, and LARS, which PyTorch lacks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pix2rep.config import PretrainConfig

MOMENTUM = 0.9  # of "sgd" and "lars"


def build_optimizer(opt: PretrainConfig, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser named by pretrain.optimizer, for parameters on `device`."""
    options = {"lr": opt.lr, "weight_decay": opt.weight_decay}
    if opt.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **options)
    if opt.optimizer == "radam":
        return torch.optim.RAdam(parameters, **options)
    if opt.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=MOMENTUM, **options)
    return Lars(parameters, **options)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017): SGD with momentum whose gradient g + weight_decay p is scaled, tensor by tensor, to
    `trust` times the parameter's length. Vectors (biases, norms) get plain momentum and no decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = MOMENTUM, trust: float = 1e-3):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                moved = state["momentum"].mul_(group["momentum"]).add_(self._scaled(parameter, group))
                parameter.sub_(group["lr"] * moved)

    @staticmethod
    def _scaled(parameter: nn.Parameter, group: dict) -> Tensor:
        if parameter.ndim < 2:
            return parameter.grad
        update = parameter.grad + group["weight_decay"] * parameter
        length, change = parameter.norm(), update.norm()
        rate = torch.where((length > 0) & (change > 0), group["trust"] * length / change, torch.ones_like(length))
        return rate * update
