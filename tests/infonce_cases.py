"""Small cases of infonce for kernels that run interpreted or emulated: every option, every way to keep exp2 in range, the edges of the blocks."""

import torch
import torch.nn.functional as F

# Fields left out take the values of DEFAULTS. N = 64, 70 straddle a block, D = 16, 17 a padding step. Blocks free of left-out pairs, and
# several parts of a sweep, begin at a few hundred rows: the four cases at the end.
DEFAULTS = {
    "negatives": "joint",
    "groups": 1,
    "n": 20,
    "m": None,  # rows of b, n when None
    "d": 8,
    "dtype": "float32",
    "rows": "random",  # "near": positives close; "antipodal": the first row opposes all; "same": one row, repeated; "blocks": two clusters
    "valid": False,  # about a third invalid, and NaN there
    "ids": 0,  # how many different ones; 0: none
    "queue": 0,
    "positive": None,  # "permuted"; "repeated": "forward" only
    "temperature": 0.1,
    "floor": None,  # None: the temperature is a float, its own floor
    "precision": "ieee",
}

SMALL_CASES = [
    *({"negatives": negatives} for negatives in ("joint", "cross", "forward")),
    {"n": 1},
    {"n": 64, "d": 16, "precision": "fp16"},
    {"n": 70, "d": 17, "precision": "fp16", "rows": "near"},
    {"n": 70, "negatives": "cross", "valid": True, "ids": 20, "groups": 2, "positive": "permuted"},
    {"n": 70, "valid": True, "ids": 20, "queue": 9, "groups": 2, "positive": "permuted", "temperature": 0.53},
    {"n": 33, "m": 70, "negatives": "forward", "valid": True, "ids": 20, "queue": 9, "groups": 2, "positive": "repeated"},
    {"n": 21, "m": 13, "negatives": "forward", "positive": "repeated"},
    {"n": 10, "m": 40, "negatives": "forward", "queue": 70},
    {"n": 40, "valid": True},
    {"n": 40, "ids": 5},
    {"n": 40, "ids": 1, "queue": 3},
    {"n": 40, "negatives": "cross", "ids": 1},
    {"n": 40, "queue": 5, "precision": "fp16"},
    {"n": 30, "positive": "permuted", "precision": "tf32x3"},
    {"n": 30, "d": 100, "negatives": "cross", "positive": "permuted"},
    {"n": 20, "d": 300, "precision": "fp16"},
    {"n": 20, "d": 300, "negatives": "cross"},
    {"n": 20, "d": 520, "negatives": "forward"},
    {"n": 30, "dtype": "bfloat16", "precision": None},
    {"n": 30, "dtype": "float16", "precision": None, "negatives": "cross"},
    # No shift down to about 0.0135, one constant down to 0.0075, a running maximum below; the floor alone decides.
    {"temperature": 0.07, "floor": 0.01, "negatives": "cross"},
    {"temperature": 0.01, "floor": 0.01},
    {"temperature": 0.005, "floor": 0.02},
    {"temperature": 0.07, "floor": 1e-4},
    {"temperature": 0.002, "negatives": "cross", "valid": True, "ids": 5},
    {"temperature": 0.002, "queue": 7, "valid": True, "positive": "permuted"},
    {"temperature": 0.0138, "rows": "same"},
    {"temperature": 0.01, "rows": "antipodal"},
    {"temperature": 0.0076, "rows": "antipodal", "negatives": "cross", "valid": True},
    {"temperature": 0.0076, "rows": "antipodal", "negatives": "forward", "queue": 4},
    {"temperature": 0.0076, "rows": "blocks", "precision": "fp16"},
    {"temperature": 0.01, "rows": "near", "precision": "fp16"},
    {"temperature": 10.0, "precision": "fp16", "negatives": "cross"},
    {"n": 260, "d": 16, "valid": True, "ids": 9, "positive": "permuted"},
    {"n": 260, "d": 16, "precision": "fp16"},
    {"n": 260, "d": 16, "negatives": "cross", "precision": "fp16"},
    {"n": 260, "m": 150, "d": 16, "negatives": "forward", "queue": 200, "positive": "repeated", "temperature": 0.01},
]

# What only the CUDA kernels tell apart: every width of their gradient products with and without lists, tiles without padding, several blocks of a part.
CUDA_CASES = [
    *({"n": 64, "d": d, "precision": "fp16"} for d in (32, 48, 64, 96, 128, 160, 256, 272)),
    *({"n": 40, "d": d, "precision": "fp16", "ids": 9, "valid": True, "negatives": "cross"} for d in (24, 64, 128, 200, 300)),
    *({"n": 40, "d": d, "precision": "fp16", "temperature": 0.01, "queue": 70} for d in (24, 64, 128, 200, 300)),
    *({"n": 40, "d": d, "precision": "fp16", "temperature": 0.002, "negatives": "cross"} for d in (64, 200)),
    {"n": 128, "d": 64, "precision": "fp16", "negatives": "cross"},
    {"n": 192, "d": 64, "precision": "fp16"},
    {"n": 192, "d": 64, "precision": "fp16", "valid": True, "temperature": 0.01},
    {"n": 256, "m": 384, "d": 16, "precision": "fp16", "negatives": "forward", "queue": 256},
    {"n": 150, "m": 300, "d": 16, "precision": "fp16", "negatives": "forward", "positive": "repeated", "valid": True, "groups": 2},
    {"n": 4300, "d": 8, "precision": "fp16", "negatives": "forward", "m": 130, "positive": "repeated"},
]


def build(case: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """a [G, N, D], b [G, M, D] and the keyword arguments of `infonce` for one case, from the generator's current seed."""
    c = DEFAULTS | case
    groups, n, d, dtype = c["groups"], c["n"], c["d"], getattr(torch, c["dtype"])
    m = c["m"] or n
    a, b = torch.randn(groups, n, d), torch.randn(groups, m, d)
    if c["rows"] == "near":
        b = a + 0.1 * b
    elif c["rows"] == "antipodal":
        b = a[:, 1:2] + 0.1 * b
        a = a[:, 1:2] + 0.1 * torch.randn_like(a)
        a[:, 0] = -a[:, 1]
    elif c["rows"] == "same":
        a, b = a[:, :1].expand_as(a), a[:, :1].expand_as(b)
    elif c["rows"] == "blocks":
        signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).unsqueeze(1)
        a, b = signs * (a[:, :1] + 0.1 * a), signs * (a[:, :1] + 0.1 * b)
    a, b = F.normalize(a, dim=-1).to(dtype), F.normalize(b, dim=-1).to(dtype)
    options = {"negatives": c["negatives"], "precision": c["precision"], "temperature": c["temperature"]}
    if c["floor"] is not None:
        options |= {"temperature": torch.tensor(c["temperature"]), "temperature_floor": c["floor"]}
    if c["positive"] == "permuted":
        options["positive"] = torch.stack([torch.randperm(n) for _ in range(groups)])
    elif c["positive"] == "repeated":
        options["positive"] = torch.randint(0, max(m // 2, 1), (groups, n))
    if c["valid"]:
        options |= {"valid_a": torch.rand(groups, n) > 0.3, "valid_b": torch.rand(groups, m) > 0.3}
        a, b = (torch.where(valid.unsqueeze(-1), x, torch.nan) for x, valid in ((a, options["valid_a"]), (b, options["valid_b"])))
    if c["ids"]:
        options |= {f"ids_{side}": torch.randint(0, c["ids"], (groups, size)) * 2**40 for side, size in (("a", n), ("b", m))}
    if c["queue"]:
        options["queue"] = F.normalize(torch.randn(c["queue"], d), dim=-1).to(dtype)
    return a, b, options
