"""Time of attention with column sums against attention without, at the sizes of the full network.

Run:  python benchmarks/attention.py --output attention.json      (takes the GPU when there is one)
"""

import argparse
import json
import time

import torch

from stream3r_core.evaluation.conditions import device_name
from stream3r_core.kernels import reference, registry

HEADS, WIDTH, KEYS = 16, 64, 13_533  # a chunk of the published profile at 518 x 392


def timed_ms(function, device, repeats):
    """Median time of a call, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == 'cuda':
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times[1:])[repeats // 2]


def measure(num_queries, num_keys, dtype, device, repeats):
    generator = torch.Generator(device).manual_seed(0)

    def rand(n):
        return torch.randn(1, HEADS, n, WIDTH, device=device, generator=generator).to(dtype)

    q, k, v = rand(num_queries), rand(num_keys), rand(num_keys)
    bias = torch.randn(1, HEADS, 1, num_keys, device=device, generator=generator)
    rows = {}
    for backend in registry.BACKENDS:
        for name, sums, given in (('plain', False, None), ('bias', False, bias),
                                  ('column sums', True, bias)):  # fmt: skip
            request = registry.Request.of(q, k, given, sums)
            refusal = backend.refusal(request)
            if refusal is None:
                rows[f'{backend.name}, {name}'] = {
                    'ms': timed_ms(lambda b=backend, g=given: b.run(q, k, v, g), device, repeats)
                }
                if sums:
                    rows[f'{backend.name}, {name}'] |= errors(backend, q, k, v, given)
            else:
                rows[f'{backend.name}, {name}'] = {'cannot': refusal}
    return rows


def errors(backend, q, k, v, bias):
    """Distance from the reference, on the first two heads (its logits are dense)."""
    heads = slice(0, 2)
    out, sums = backend.run(q[:, heads], k[:, heads], v[:, heads], bias[:, heads])
    expected = reference.attention(q[:, heads], k[:, heads], v[:, heads], bias[:, heads])
    relative = (sums - expected.column_sums).abs() / expected.column_sums
    return {
        'out error': (out.float() - expected.out.float()).abs().max().item(),
        'column sum error, relative': relative.max().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--queries', type=int, nargs='+', default=(1041, 4164))
    parser.add_argument('--keys', type=int, default=KEYS)
    parser.add_argument('--dtypes', nargs='+', default=['float16', 'bfloat16'])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--output', default='')
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result = {'arguments': vars(arguments), 'device': device_name(device), 'rows': {}}
    for dtype in arguments.dtypes:
        for queries in arguments.queries:
            rows = measure(
                queries, arguments.keys, getattr(torch, dtype), device, arguments.repeats
            )
            result['rows'][f'{dtype}, {queries} x {arguments.keys}'] = rows
            for name, row in rows.items():
                print(f'{dtype:9} {queries:5} x {arguments.keys}  {name:24} {row}')
    if arguments.output:
        with open(arguments.output, 'w') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()
