"""Functions that are made of others compute what PyTorch's own do."""

import torch
import torch.nn.functional as F

from isogrid.layers.decompositions import attention


def test_a_query_that_sees_no_key_gets_zeros_and_finite_gradients() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) > 0.5
    mask[0, 0, 2] = False
    ours = attention(query, key, value, attn_mask=mask)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(ours[0, :, 2], torch.zeros(3, 8))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    gradients = torch.autograd.grad(ours.square().sum(), (query, key, value))
    expected = torch.autograd.grad(theirs.square().sum(), (query, key, value))
    for ours_, theirs_ in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5)
