"""InfoNCE on the GPU: prepare the rows, sweep the pairs once for the sums, once a side for the gradients; nothing of size N x M is stored.

    infonce_blocks     formats and block sizes
    infonce_rows       kernels that work once a row: operands, losses (infonce.3-4), weights
    infonce_problem    one call's operands
    infonce_forward    sums over the negatives (infonce.2): one exponential a pair serves rows and columns, "joint" sweeps one triangle
    infonce_backward   gradient products (infonce.5-6): one over the square for "joint", one for `a` and one for `b` otherwise

Positive pairs stay outside every product (infonce.3). All reductions have a fixed order.
"""

from pix2rep_kernels.triton.infonce_backward import backward
from pix2rep_kernels.triton.infonce_forward import forward

__all__ = ["backward", "forward"]
