"""Normalisation and rotation of queries or keys as one Triton pass over the tokens.

In plain PyTorch they are a dozen small operations per layer, each of which reads and writes all
tokens and costs a launch. Works on the CPU under ``TRITON_INTERPRET=1`` (tests).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, out_ptr,
    x_b, x_h, x_n, out_b, out_h, out_n,
    H, N, P, D, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    # Each half of the channels turns on its own: channel i with channel i + D / 4.
    half = D // 2
    partner = channels // half * half + (channels % half + half // 2) % half
    exists = channels < D
    mask = (rows < N)[:, None] & exists[None, :]
    base = x_ptr + batch * x_b + head * x_h + rows[:, None] * x_n
    x = tl.load(base + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    swapped = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(weight_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    weight_of_partner = tl.load(weight_ptr + partner, mask=exists, other=0.0).to(tl.float32)
    bias_of_partner = tl.load(bias_ptr + partner, mask=exists, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + bias[None, :]
    y_of_partner = (swapped - mean[:, None]) * scale[:, None]
    y_of_partner = y_of_partner * weight_of_partner[None, :] + bias_of_partner[None, :]
    place = (rows % P)[:, None] * D + channels[None, :]
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
    out_tile = out_ptr + batch * out_b + head * out_h + rows[:, None] * out_n + channels[None, :]
    tl.store(out_tile, (y * cos + y_of_partner * sin).to(out_ptr.dtype.element_ty), mask=mask)


def normalise_and_rotate(
    x: Tensor,  # [B, H, N, D] of any strides but the last; D a multiple of 4
    weight: Tensor,  # [D] float32, as the next
    bias: Tensor,
    eps: float,
    cos: Tensor,  # [P, D] float32; N is a multiple of P
    sin: Tensor,  # [P, D] with its sign, see stream3r_core.model.rope
) -> Tensor:
    """Return layer_norm(x) turned by the positions of the tokens, in the type of x."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, H, N, D = x.shape
    out = torch.empty(B, H, N, D, dtype=x.dtype, device=x.device)
    rows = 32
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(N, rows), B * H)](
            x, weight, bias, cos, sin, out, *x.stride()[:3], *out.stride()[:3],
            H, N, len(cos), D, eps,
            BLOCK_N=rows, BLOCK_D=max(16, triton.next_power_of_2(D)),
        )  # fmt: skip
    return out
