"""One wording for every refusal: argument, expectation, value. `csrc/common/check.h` says the same in C++."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect(condition: bool, argument: str, expectation: str, got: object) -> None:
    """Raise ValueError "`argument` must expectation, got value" unless `condition` holds.

    Where `expectation` or `got` is made from sizes, test the condition first and call only on failure: under `torch.compile` with dynamic shapes
    formatting a size fixes it, and every new shape would compile again.
    """
    if not condition:
        raise ValueError(f"`{argument}` must {expectation}, got {got}")


def expect_tensor(value: object, argument: str) -> None:
    """Raise TypeError unless `value` is a torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{argument}` must be a torch.Tensor, got {type(value).__name__}")


def expect_float(tensor, argument: str) -> None:
    """Raise TypeError unless `tensor` is a tensor of one of the four floating types that the ops take."""
    expect_tensor(tensor, argument)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"`{argument}` must be float16, bfloat16, float32 or float64, got {str(tensor.dtype).removeprefix('torch.')}")


def expect_dtype(tensor, argument: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless `tensor` is a tensor of `dtype`."""
    expect_tensor(tensor, argument)
    if tensor.dtype != dtype:
        raise TypeError(f"`{argument}` must be {str(dtype).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}")


def expect_temperature(value: object, argument: str = "temperature") -> None:
    """Raise TypeError or ValueError unless `value` is a Python number > 0 that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{argument}` must be a float or a 0-d tensor, got {value!r}")
    # 1/tau must be finite in float32 too.
    expect(1e-30 <= value <= 1e30, argument, "be > 0 and finite (1e-30 to 1e30)", value)


def expect_device(tensor, argument: str, like, like_name: str) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        expect(False, argument, f"be on {like.device} as `{like_name}` is", tensor.device)


def checked_mask(mask, features: torch.Tensor, name: str) -> torch.Tensor:
    """`mask` as [B, *S]. Raises unless it is bool, [B, *S] or [B, 1, *S], on the device of the map `features` (called `name`)."""
    expect_dtype(mask, "mask", torch.bool)
    batch, _, *size = features.shape
    mask = mask.squeeze(1) if mask.ndim == features.ndim and mask.shape[1] == 1 else mask
    if list(mask.shape) != [batch, *size]:
        expect(False, "mask", f"have shape {(batch, 1, *size)} or {(batch, *size)}", tuple(mask.shape))
    expect_device(mask, "mask", features, name)
    return mask


def expect_choice(value: object, argument: str, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:  # asked at every call of an op: the sentence is made when it is needed
        expect(False, argument, "be one of " + ", ".join(map(repr, choices)), repr(value))
