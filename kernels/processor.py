"""What this processor multiplies fast."""

import torch


def has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 itself: others take ten times as long."""
    # PyTorch 2.5 has this question under this name only, and no other for it.
    asked = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    return bool(asked())
