"""Measure weights on held-out synthetic rooms: clips beside baselines, and one long stream."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from stream3r_core.checkpoints import load_model
from stream3r_core.geometry import invert_se3
from stream3r_core.model.network import CausalVGGT
from stream3r_core.refinement import PoseRefiner
from stream3r_core.session import StreamSession
from stream3r_core.synthetic import SyntheticSequence, render_sequence
from stream3r_core.training.data import HELD_OUT_SEED, DataMixture
from stream3r_core.training.settings import MOTIONS, StageConfig, TrainingConfig
from stream3r_core.training.validation import angle_deg, validate
from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import uncertainty_name

STREAM_SEED = HELD_OUT_SEED + 1_000_000


def measure_clips(model: CausalVGGT, scenes: int, frames: int, family: StageConfig) -> dict:
    """Return the means of :func:`validate` over held-out clips of a family of worlds, 10 Hz."""
    config = TrainingConfig(validation_scenes=scenes, validation_frames=frames, stages=(family,))
    return validate(model, DataMixture(config).held_out(0), 'causal', bf16=False, refine=True)


def measure_stream(
    model: CausalVGGT, sequence: SyntheticSequence, mode: str
) -> dict[str, list[dict[str, float]]]:
    """Return the errors along one stream, as the network states its poses and refined."""
    session, refiner = StreamSession(model, mode=mode, outputs=('depth',)), PoseRefiner()
    stated = [session.step(image).to('cpu') for image in sequence.images]
    refined = [refiner.refine(answer) for answer in stated]
    return {
        uncertainty_name(mode, is_refined): errors_along(sequence, answers)
        for is_refined, answers in ((False, stated), (True, refined))
    }


def errors_along(
    sequence: SyntheticSequence, answers: list[FramePrediction], bins: int = 10
) -> list[dict[str, float]]:
    """Return how the errors of one stream grow with the frame index, in ``bins`` parts.

    Depth and positions share the one scale of the first part: a drifting scale is an error here.
    """
    path = invert_se3(sequence.T_world_camera[:1]) @ sequence.T_world_camera
    estimate = torch.stack([a.T_world_camera for a in answers])
    truth = [_at_size(d, a.depth.shape) for d, a in zip(sequence.depth_m, answers)]
    count = max(1, len(answers) // bins)
    scale = torch.stack([t.median() / a.depth.median() for t, a in zip(truth[:count], answers)])
    scale = scale.median()
    depth = torch.stack([((scale * a.depth - t).abs() / t).mean() for t, a in zip(truth, answers)])
    distance = (scale * estimate[:, :3, 3] - path[:, :3, 3]).norm(dim=-1)
    angle = angle_deg(estimate, path)
    return [
        {
            'first_frame': start,
            'abs_rel': depth[start : start + count].mean().item(),
            'rotation_deg': angle[start : start + count].mean().item(),
            'position_m': distance[start : start + count].mean().item(),
        }
        for start in range(0, len(answers), count)
    ]


def _at_size(depth: Tensor, size_hw: torch.Size) -> Tensor:
    return torch.nn.functional.interpolate(depth[None, None], tuple(size_hw), mode='nearest')[0, 0]


def main() -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('weights', type=Path, help='.safetensors file of a training run')
    parser.add_argument('--scenes', type=int, default=24)
    parser.add_argument('--frames', type=int, default=30)
    parser.add_argument(
        '--fov-deg', nargs=2, type=float, default=(58.0, 66.0), help='horizontal, from and to'
    )
    parser.add_argument(
        '--room-half-m',
        nargs=2,
        type=float,
        default=(2.2, 3.4),
        help='half the room of the clips, from and to; that of the stream has 1.5 to 3.5',
    )
    parser.add_argument(
        '--motion', choices=tuple(MOTIONS), default='calm', help='how the camera is carried'
    )
    parser.add_argument(
        '--stream', type=int, default=0, help='length of the long stream; 0 = none'
    )
    parser.add_argument(
        '--modes', nargs='+', default=['window'], help='session modes of the stream'
    )
    options = parser.parse_args()
    model = load_model(None, options.weights, dtype=torch.float32)
    width = model.config.img_size
    size_hw = (width * 3 // 4, width)
    family = StageConfig(
        size_hw=size_hw,
        fov_deg=tuple(options.fov_deg),
        room_half_m=tuple(options.room_half_m),
        motions=(options.motion,),
    )
    result = {
        'weights_sha256': model.weights_info.sha256,
        'size_hw': size_hw,
        'fov_deg': family.fov_deg,
        'room_half_m': family.room_half_m,
        'motion': options.motion,
        'clips': measure_clips(model, options.scenes, options.frames, family),
    }
    if options.stream:
        sequence = render_sequence(
            STREAM_SEED,
            options.stream,
            *size_hw,
            fov_deg=sum(family.fov_deg) / 2,
            motion=MOTIONS[options.motion],
        )
        result['stream'] = {}
        for mode in options.modes:
            result['stream'] |= measure_stream(model, sequence, mode)
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
