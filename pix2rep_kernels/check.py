"""One wording for every refusal: argument, expectation, value. `csrc/common/check.h` says the same in C++."""


def expect(condition: bool, argument: str, expectation: str, got: object) -> None:
    """Raise ValueError "`argument` must expectation, got value" unless `condition` holds."""
    if not condition:
        raise ValueError(f"`{argument}` must {expectation}, got {got}")


def expect_float(tensor, argument: str) -> None:
    """Raise TypeError unless `tensor` is a real floating-point tensor."""
    if not tensor.is_floating_point():
        raise TypeError(f"`{argument}` must be float16, bfloat16, float32 or float64, got {str(tensor.dtype).removeprefix('torch.')}")


def expect_device(tensor, argument: str, like, like_name: str) -> None:
    """Raise ValueError unless both tensors are on one device."""
    expect(tensor.device == like.device, argument, f"be on {like.device} as `{like_name}` is", tensor.device)


def expect_choice(value: object, argument: str, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    expect(value in choices, argument, "be one of " + ", ".join(map(repr, choices)), repr(value))
