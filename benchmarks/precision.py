"""What the precision of products, weights, keys and values costs in accuracy, and what it saves.

Run:  python benchmarks/precision.py --output precision.json

Causal streams over rendered rooms with held-out seeds. Every variant sees the same images; depth
and trajectory are judged against the truth, and against the variant that has float32 throughout.
"""

import argparse
import json
import time

import numpy as np
import torch

from stream3r_core import load_model
from stream3r_core.config import ImageConfig
from stream3r_core.evaluation.conditions import conditions
from stream3r_core.evaluation.depth import DepthAccumulator
from stream3r_core.evaluation.trajectory import Trajectory, ate
from stream3r_core.int8_weights import parameter_bytes, with_int8_weights
from stream3r_core.session import StreamSession
from stream3r_core.synthetic import render_sequence

#: Products, weights, keys and values.
VARIANTS = (
    ('float32', 'model', 'model'), ('float32', 'model', 'int8'), ('float32', 'model', 'int4'),
    ('float32', 'int8', 'model'),
    ('bfloat16', 'model', 'model'), ('bfloat16', 'model', 'int8'), ('bfloat16', 'model', 'int4'),
    ('bfloat16', 'int8', 'model'), ('bfloat16', 'int8', 'int8'),
)  # fmt: skip


def loaded(args, dtype, weights):
    """Return the network with products and weights of these types."""
    model = load_model(args.preset, args.weights, dtype=getattr(torch, dtype))
    return with_int8_weights(model) if weights == 'int8' else model


def run(model, sequence, mode, kv_dtype):
    """Return the predictions, bytes of keys and values, and processor time of the last frames."""
    long_side = max(sequence.images.shape[1:3])
    session = StreamSession(
        model, mode, kv_dtype=kv_dtype, image=ImageConfig(long_side=long_side), outputs=('depth',)
    )
    predictions, took = [], []
    for image, stamp_ns in zip(sequence.images, sequence.stamps_ns):
        started = time.process_time()
        predictions.append(session.step(image, stamp_ns))
        took.append(1000 * (time.process_time() - started))
    last = len(took) // 4
    return predictions, session.cache.num_bytes, float(np.median(took[-last:]))


def judge(sequence, predictions, exact):
    """Errors against the truth, and the distance from float32."""
    depth = DepthAccumulator()
    for prediction, truth in zip(predictions, sequence.depth_m):
        depth.add(prediction.depth, truth)
    stamps = np.array(sequence.stamps_ns)
    truth = Trajectory(stamps, sequence.T_world_camera.double().numpy())
    estimate = Trajectory(stamps, torch.stack([p.T_world_camera for p in predictions]).double())
    off = [((p.depth - e.depth).abs() / e.depth).mean() for p, e in zip(predictions, exact)]
    moved = [(p.T_world_camera - e.T_world_camera)[:3, 3].norm()
             for p, e in zip(predictions, exact)]  # fmt: skip
    return {
        'abs_rel': depth.errors('scale').abs_rel,
        'ate_m': ate(truth, estimate).rmse,
        'depth_off': float(torch.stack(off).mean()),
        'position_off': float(torch.stack(moved).max()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='tiny')
    parser.add_argument('--weights', default=None)
    parser.add_argument('--mode', default='causal', choices=('causal', 'window'))
    parser.add_argument('--seeds', type=int, default=6)
    parser.add_argument('--first-seed', type=int, default=9000)
    parser.add_argument('--frames', type=int, default=60)
    parser.add_argument('--size', type=int, nargs=2, default=(48, 64), metavar=('H', 'W'))
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    models = {(dtype, weights): loaded(args, dtype, weights) for dtype, weights, _ in VARIANTS}
    rows = {', '.join(variant): [] for variant in VARIANTS}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        sequence, exact = render_sequence(seed, args.frames, *args.size), None
        for dtype, weights, kv_dtype in VARIANTS:
            model = models[dtype, weights]
            predictions, num_bytes, took = run(model, sequence, args.mode, kv_dtype)
            exact = exact or predictions
            row = judge(sequence, predictions, exact)
            row |= {'bytes': num_bytes, 'weights': parameter_bytes(model), 'ms': took}
            rows[f'{dtype}, {weights}, {kv_dtype}'].append(row)
    for name, found in rows.items():
        mean = {key: float(np.mean([row[key] for row in found])) for key in found[0]}
        print(f'{name:36}', '  '.join(f'{key} {value:.4g}' for key, value in mean.items()))
    facts = {'conditions': conditions(models['float32', 'model']), 'options': vars(args)}
    with open(args.output, 'w', encoding='utf-8') as file:
        json.dump(facts | {'variants': rows}, file, indent=1)


if __name__ == '__main__':
    main()
