"""What every method is: heads, views and one step, and the batch that the step takes."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from pix2rep.config import Config


@dataclass
class Batch:
    """Images [B, 1, *S] float32 in [0, 1], and what a method asks for beside them (`Method.needs`)."""

    images: Tensor
    regions: Tensor | None = None  # int32 [B, *S]: superpixels, -1 where there is none
    crops: Tensor | None = None  # float32 [2, B, 1, *S]: two overlapping crops of each volume (the first is `images`)
    boxes: Tensor | None = None  # float32 [2, 2, B, 3]: lower and upper edges of the region that both crops see, in voxels of each crop
    spacing: Tensor | None = None  # float32 [B, len(S)]: voxel sizes, mm
    depths: Tensor | None = None  # float32 [B] in (0, 1): place of a slice's middle in its volume
    indices: Tensor | None = None  # int64 [B]: items of the source
    patients: list[str] = field(default_factory=list)  # one an image

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {entry.name: value for entry in fields(self) if isinstance(value := getattr(self, entry.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


class Method(nn.Module):
    """One objective: its heads, its views, its step.

    Sub-modules that require gradients are trained with the backbone; everything in the state_dict is checkpointed, so that moving averages
    and queues are buffers or modules without gradient. The backbone itself must not be a sub-module (a copy may).
    """

    needs: frozenset[str] = frozenset()  # fields of Batch beyond images and patients; the source's method of that name makes each from indices
    scheduled = False  # whether `after_step` depends on the number of steps: a resumed run may not change it then

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__()
        self.config = config
        self.autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # the trainer's mixed precision
        self._compiled: dict[Callable, Callable] = {}

    def step(self, backbone: Callable, batch: Batch, generator: torch.Generator, monitor: bool = False) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch, and the collapse statistics when `monitor` (they wait for the device), else {}.

        backbone: `Network`, or the bare module; generator: of every draw, on the device of the images.
        """
        raise NotImplementedError

    def after_step(self, backbone: nn.Module, step: int, steps: int) -> None:
        """Called when the optimiser has taken step `step` of `steps`, counted from 0: moving averages."""

    def call(self, function: Callable, *inputs: Any) -> Any:
        """`function(*inputs)`, a network or a method of one, in the run's mixed precision and compiled where pretrain.compile says so.

        For heads and encoders; views and losses stay outside.
        """
        if self.config.pretrain.compile:
            if function not in self._compiled:
                self._compiled[function] = torch.compile(function)
            function = self._compiled[function]
        with self.autocast():
            return function(*inputs)


class Network:
    """A backbone as a step calls it: through `Method.call`."""

    def __init__(self, method: Method, backbone: nn.Module):
        self.method, self.backbone = method, backbone

    def __call__(self, x: Tensor) -> Tensor:
        """[B, 1, *S] -> [B, out_channels, *S]."""
        return self.method.call(self.backbone, x)

    def encode(self, x: Tensor) -> list[Tensor]:
        return self.method.call(self.backbone.encode, x)

    def decode(self, maps: list[Tensor], size: tuple[int, ...]) -> Tensor:
        return self.method.call(self.backbone.decode, maps, size)


def expect_encoder(backbone: nn.Module, option: str) -> tuple[int, ...]:
    """Channels of the maps of `backbone.encode`, coarsest last. Raises ValueError, naming the option that wants them, for a backbone without."""
    if not (callable(getattr(backbone, "encode", None)) and callable(getattr(backbone, "decode", None)) and hasattr(backbone, "encoder_channels")):
        raise ValueError(f"{option} needs a backbone with encode, decode and encoder_channels, got {type(backbone).__name__}")
    return tuple(backbone.encoder_channels)
