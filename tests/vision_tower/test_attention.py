"""Plain bf16 attention on a CPU against the fused kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vision_tower.model.attention import attend, prefers_plain


@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_equal_the_fused_kernel(masked: bool) -> None:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    assert prefers_plain(cpu, torch.bfloat16) and not prefers_plain(cpu, torch.float32)
    exact = [torch.randn(2, 3, length, 16, dtype=torch.float64, requires_grad=True) for length in (9, 14, 14)]
    allowed = torch.ones(9, 14, dtype=torch.bool).tril(5) if masked else None
    expected = F.scaled_dot_product_attention(*exact, attn_mask=allowed)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    rounded = [value.detach().bfloat16().requires_grad_() for value in exact]
    found = attend(*rounded, allowed)
    found.backward(upstream.bfloat16())
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.02)
    for ours, theirs in zip(rounded, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=0.06, rtol=0.02)
