"""The obvious implementation of the stream, the baseline of every ratio, and the ratios.

It shares every module with the fast path and does what one writes first: the cache is concatenated
anew for every frame and layer, the outputs of all layers are kept, both dense heads run, all in
float32 and in PyTorch's default layout. Attention is PyTorch's own fused one.

Run:  python benchmarks/naive.py --size 64x48 --frames 100 --output naive.json

Frames of all variants are taken in turn, so that a busy machine burdens them alike; processor time
is the figure to read there.
"""

import argparse
import json
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from stream3r_core import load_model
from stream3r_core.benchmark.measure import Plan, camera_images
from stream3r_core.evaluation.conditions import conditions
from stream3r_core.int8_weights import with_int8_weights
from stream3r_core.kernels.processor import has_bfloat16
from stream3r_core.model.dpt_head import inverse_log
from stream3r_core.model.rope import rotary_tables
from stream3r_core.session import StreamSession


class Concatenated:
    """Keys and values of one layer: [1, heads, N, head_dim], all of them, or anchor and recent."""

    def __init__(self):
        self.k = self.v = None

    def attention(self, q, k, v):
        """Attend to all tokens so far and the new ones."""
        self.k = k if self.k is None else torch.cat((self.k, k), 2)
        self.v = v if self.v is None else torch.cat((self.v, v), 2)
        return F.scaled_dot_product_attention(q, self.k, self.v)

    def forget(self, tokens_per_frame, window):
        """Keep the first frame and the last ``window``."""
        if self.k is not None and self.k.shape[2] > (window + 1) * tokens_per_frame:
            first, recent = slice(tokens_per_frame), slice(-window * tokens_per_frame, None)
            self.k = torch.cat((self.k[:, :, first], self.k[:, :, recent]), 2)
            self.v = torch.cat((self.v[:, :, first], self.v[:, :, recent]), 2)


class NaiveSession:
    """One image [3, H, W] in, the raw outputs of :meth:`StreamSession.step_tensor` out.

    ``window`` None: mode causal; else mode window with the published rule.
    """

    def __init__(self, model, window=None):
        self.model, self.window = model, window
        self.reset()

    def reset(self):
        """Start a new stream."""
        c = self.model.config
        self.layers = [Concatenated() for _ in range(c.depth)]
        self.camera_layers = [
            Concatenated() for _ in range(c.camera_iterations * c.camera_trunk_depth)
        ]
        self.num_frames = 0

    @torch.inference_mode()
    def step_tensor(self, image):
        """Process one float image [3, H, W] in [0, 1]."""
        model, c = self.model, self.model.config
        images = image[None, None].to(model.device)
        height, width = images.shape[-2:]
        outputs = self._aggregate(images)  # of all layers
        poses = model.camera_head(
            outputs[-1][:, :, 0].float(), lambda layer: self.camera_layers[layer].attention
        )
        taps = [outputs[layer] for layer in c.dpt_layers]
        depth, depth_conf = model.depth_head(taps, height, width)
        points, points_conf = model.point_head(taps, height, width)
        if self.window is not None:
            for layers, tokens in ((self.layers, outputs[0].shape[2]), (self.camera_layers, 1)):
                for layer in layers:
                    layer.forget(tokens, self.window)
        self.num_frames += 1
        result = {
            'pose_enc': poses[-1],
            'depth': depth.exp(),
            'depth_conf': depth_conf,
            'world_points': inverse_log(points),
            'world_points_conf': points_conf,
        }
        return {name: value[0, 0] for name, value in result.items()}

    def _aggregate(self, images):
        aggregator, c = self.model.aggregator, self.model.config
        special = torch.cat((aggregator.camera_token, aggregator.register_token), 2)
        special = special[:, :1] if self.num_frames == 0 else special[:, 1:]
        x = torch.cat((special, aggregator.encode(images)), 2)[0]  # [1, P, C]
        rows, columns = (side // c.patch_size for side in images.shape[-2:])
        rotary = rotary_tables(
            rows, columns, c.num_special_tokens, c.head_dim, c.rope_freq, x.device
        )
        outputs = []
        for frame_block, global_block, layer in zip(
            aggregator.frame_blocks, aggregator.global_blocks, self.layers
        ):
            frame = frame_block(x, rotary=rotary)
            x = global_block(frame, layer.attention, rotary)
            outputs.append(torch.cat((frame, x), -1)[None])  # [1, 1, P, 2C]
        return outputs


def measured(sessions, images, num_frames, repeats, last):
    """Median seconds of the last frames of streams whose frames take turns, and what they say."""
    samples, answers = {name: [] for name in sessions}, {}
    for _ in range(repeats):
        for session in sessions.values():
            session.reset()
        for index in range(num_frames):
            for name, session in sessions.items():
                start, processor = time.perf_counter(), time.process_time()
                answers[name] = session.step_tensor(images[index % len(images)])
                if session.model.device.type == 'cuda':
                    torch.cuda.synchronize()
                took = time.perf_counter() - start, time.process_time() - processor
                if index >= num_frames - last:
                    samples[name].append(took)
    rows = {
        name: dict(zip(('wall_s', 'processor_s'), np.median(taken, 0).tolist()))
        for name, taken in samples.items()
    }
    for name, row in rows.items():
        row |= differences(answers[name], answers['naive'])
        row['times_faster'] = rows['naive']['wall_s'] / row['wall_s']
        row['times_less_processor'] = rows['naive']['processor_s'] / row['processor_s']
    return rows


def differences(answer, expected):
    """How far the last frame is from that of the baseline."""
    depth, true_depth = answer['depth'], expected['depth']
    return {
        'depth_mean_relative': float(((depth - true_depth).abs() / true_depth).mean()),
        'pose_max': float((answer['pose_enc'] - expected['pose_enc']).abs().max()),
    }


def variants(args, load):
    """Return (name, session): the baseline, then the fast path with one step more each."""
    plain = load(torch.float32).to(memory_format=torch.contiguous_format)
    fast = load(torch.float32)
    common = {'mode': args.mode, 'window': args.window}
    if args.mode == 'causal':
        common['max_frames'] = args.frames
    one = {'outputs': ('depth',), **common}
    yield 'naive', NaiveSession(plain, args.window if args.mode == 'window' else None)
    yield 'in place, used taps only', StreamSession(plain, **common)
    yield '+ channels-last heads', StreamSession(fast, **common)
    yield '+ no point head', StreamSession(fast, **one)
    narrow = torch.float32
    if args.device != 'cpu' or has_bfloat16():
        narrow = torch.bfloat16
        yield '+ bfloat16', StreamSession(load(narrow), **one)
    yield '+ int8 keys, values', StreamSession(load(narrow), kv_dtype='int8', **one)
    yield '+ int8 weights instead', StreamSession(with_int8_weights(load(narrow)), **one)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='tiny')
    parser.add_argument('--weights', default=None)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--mode', default='causal', choices=('causal', 'window'))
    parser.add_argument('--window', type=int, default=5)
    parser.add_argument('--size', default='64x48', help='network image, WIDTHxHEIGHT')
    parser.add_argument('--frames', type=int, default=100)
    parser.add_argument('--last', type=int, default=5, help='frames at the end that count')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width, height = map(int, args.size.split('x'))
    images = [
        torch.from_numpy(image).permute(2, 0, 1).float() / 255
        for image in camera_images(Plan(height, width))
    ]
    sessions = dict(variants(args, partial(load_model, args.preset, args.weights, args.device)))
    rows = measured(sessions, images, args.frames, args.repeats, args.last)
    for name, row in rows.items():
        print(
            f'{name:26} {1e3 * row["wall_s"]:7.1f} ms {row["times_faster"]:5.2f}x  processor '
            f'{1e3 * row["processor_s"]:7.1f} ms {row["times_less_processor"]:5.2f}x  off by '
            f'depth {row["depth_mean_relative"]:.1e}, pose {row["pose_max"]:.1e}'
        )
    with open(args.output, 'w', encoding='utf-8') as file:
        facts = {'conditions': conditions(sessions['naive'].model), 'options': vars(args)}
        json.dump(facts | {'variants': rows}, file, indent=2)


if __name__ == '__main__':
    main()
