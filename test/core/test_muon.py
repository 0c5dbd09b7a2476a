"""Muon: steps of PyTorch's own, and what its updates are."""

import pytest
import torch

from stream3r_core.training.muon import Muon, orthogonal


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch.optim.Muon: torch >= 2.9')
@pytest.mark.parametrize('shape', [(24, 8), (8, 24), (16, 16)])
def test_muon_steps_as_pytorchs(shape):
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(x) for x in torch.randn(1, *shape).repeat(2, 1, 1))
    ours = Muon([mine], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn='match_rms_adamw'
    )
    for _ in range(5):
        mine.grad = theirs.grad = torch.randn(shape)
        before = theirs.detach().clone()
        ours.step()
        reference.step()
        step = (theirs - before).norm()
        assert (mine - theirs).norm() < 0.05 * step  # theirs multiplies in bfloat16
        theirs.data.copy_(mine)


def test_an_orthogonal_matrix_has_the_singular_vectors_of_its_origin():
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(2, 16, 16))
    nearly = orthogonal(U @ torch.diag(torch.logspace(-1.5, 0, 16)) @ Vh)
    turned = U.mT @ nearly @ Vh.mT
    singular = turned.diagonal(dim1=1, dim2=2)
    assert singular.min() > 0.65 and singular.max() < 1.25
    assert (turned - torch.diag_embed(singular)).abs().max() < 1e-3
