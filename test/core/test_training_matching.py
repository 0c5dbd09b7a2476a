"""Heads that are taught to match, and what of a clip is made and judged, beside known answers."""

import dataclasses
import math

import pytest
import torch
from test_training import SMALL

from stream3r_core.model.network import CausalVGGT
from stream3r_core.training.batch import Batch, make_targets
from stream3r_core.training.data import Visibility
from stream3r_core.training.matching import Recorded, matching_loss, patch_matches
from stream3r_core.training.settings import TaughtHead


def test_patches_are_matched_where_the_geometry_puts_them_and_not_through_walls():
    """A wall at 2 m; the camera steps one patch to the right; later a box hides half of it."""
    size, patch, focal = 32, 8, 32.0
    K = torch.tensor([[focal, 0, 16], [0, focal, 16], [0, 0, 1]]).expand(1, 2, 3, 3)
    T = torch.eye(4).repeat(1, 2, 1, 1)
    T[0, 1, 0, 3] = patch * 2.0 / focal
    depth = torch.full((1, 2, size, size), 2.0)
    batch = Batch(torch.rand(1, 2, 3, size, size), depth, T, K)
    weights, seen = patch_matches(batch, patch)
    weights, seen = weights.unflatten(-1, (4, 4)).unflatten(-3, (4, 4)), seen.unflatten(-1, (4, 4))
    for row in range(4):
        for column in range(3):  # what frame 1 sees in a column, frame 0 sees one to the right
            assert seen[0, 1, 0, row, column] == 1
            assert weights[0, 1, 0, row, column, row, column + 1] == pytest.approx(1, abs=1e-4)
    assert (seen[0, 1, 0, :, 3] == 0).all()
    hidden = depth.clone()
    hidden[0, 0, :, 16:] = 1.0  # in front of what frame 1 sees
    assert (patch_matches(dataclasses.replace(batch, depth=hidden), patch)[1][0, 1, 0] == 0).any()
    # Attention that points at the matches costs less than attention that points anywhere.
    flat = weights.flatten(-2).flatten(-3, -2)[0, 1, 0]
    good, none = torch.zeros(1, 34, 16), torch.zeros(1, 34, 16)
    good[0, 1:17], good[0, 18:] = 50 * torch.eye(16), flat
    (sharp, off), (blind, far) = (
        (x.item() for x in matching_loss([Recorded(TaughtHead(), x, x)], batch, patch, 1))
        for x in (good, none)
    )
    assert sharp < 0.1 * blind and blind == pytest.approx(torch.tensor(16.0).log().item())
    assert off < 0.1 < 1.0 < far


def still_views():
    """Three equal views of a wall: every patch is where it was in all of them."""
    K = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 3, 3, 3)
    T = torch.eye(4).repeat(1, 3, 1, 1)
    return Batch(torch.rand(1, 3, 3, 32, 32), torch.full((1, 3, 32, 32), 2.0), T, K)


@pytest.mark.parametrize(
    'frames, attended, cost',
    [
        ('each', (0, 1, 2), 0),  # how it divides its attention among frames is its own affair
        ('anchor', (0,), 0),
        ('anchor', (0, 1), math.log(2)),  # frames 1 and 2 look at frame 1 with half an eye
        ('earlier', (0, 1), math.log(2)),  # frame 2 as it should, frame 1 also at itself
        ('earlier', (0,), 0.25 * 50),  # frame 2 misses frame 1
    ],
)
def test_a_taught_head_is_to_look_at_its_frames_and_no_others(frames, attended, cost):
    queries, keys = torch.zeros(2, 1, 3, 17, 16)
    queries[0, :, 1:] = 200**0.5 * torch.eye(16)  # the logit of a match is 50, of all else 0
    for frame in attended:
        keys[0, frame, 1:] = 200**0.5 * torch.eye(16)
    recorded = Recorded(TaughtHead(1, 0, frames), queries.flatten(1, 2), keys.flatten(1, 2))
    entropy, distance = matching_loss([recorded], still_views(), 8, 1)
    assert entropy.item() == pytest.approx(cost, abs=1e-3)
    seen = frames != 'earlier' or attended == (0, 1)
    assert (distance.item() < 0.02) == seen


def test_only_some_frames_of_a_clip_have_dense_maps_and_targets():
    sight = Visibility(dense_share=0.4, seed=3)
    shown = sight.dense_frames(10)
    assert len(shown) == 4 and (shown.diff() > 0).all() and sight.dense_frames(2) is None
    assert {Visibility(dense_share=0.1, seed=s).dense_frames(6).tolist()[0] for s in range(40)} > {
        0,
        1,
        2,
        3,
    }
    targets = make_targets(still_views())
    some = targets.dense_at(torch.tensor([0, 2]))
    assert torch.equal(some.depth, targets.depth[:, [0, 2]])
    assert some.pose_enc.shape[1] == 3
    model, images = CausalVGGT(SMALL).eval(), torch.rand(1, 3, 3, 32, 32)
    with torch.inference_mode():
        every = model(images, 'causal')
        some = model(images, 'causal', dense_frames=torch.tensor([0, 2]))
    torch.testing.assert_close(some['depth'], every['depth'][:, [0, 2]])
    torch.testing.assert_close(some['world_points'], every['world_points'][:, [0, 2]])
    torch.testing.assert_close(some['pose_enc'], every['pose_enc'])
