"""Every attention backend against the readable reference, on awkward sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, check, inputs, measure

from stream3r_core.attention import attend, attend_with_column_sums
from stream3r_core.kernels import reference, registry, tiled, triton_support

ROOT = Path(__file__).resolve().parents[2]
by_name = pytest.mark.parametrize('case', CASES, ids=lambda c: c.name)


def run_python(*arguments, **environment):
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', *arguments],
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_reference_equals_a_loop_over_queries():
    q, k, v, bias = inputs(CASES[0])
    q, k, v, bias = q[:, :, :5], k[:, :, :7], v[:, :, :7], bias[..., :7]
    got = reference.attention(q, k, v, bias)
    for h in range(q.shape[1]):
        received = torch.zeros(7)
        for m in range(5):
            logits = torch.stack(
                [q[0, h, m] @ k[0, h, n] / 4 + bias[0, h, 0, n] for n in range(7)]
            )
            weights = logits.exp() / logits.exp().sum()
            received += weights
            torch.testing.assert_close(got.out[0, h, m], weights @ v[0, h])
            torch.testing.assert_close(got.lse[0, h, m], logits.exp().sum().log())
        torch.testing.assert_close(got.column_sums[0, h], received)


@by_name
def test_tiled_backend_equals_the_reference(case):
    def attention(q, k, v, bias, query_fraction):
        return tiled.attention(q, k, v, bias, query_fraction, tile_bytes=10_000)

    check(case, measure(attention, case))


@pytest.fixture(scope='module')
def interpreted():
    """Return the measurements of the Triton backend under its interpreter, by case name."""
    return json.loads(
        run_python(str(ROOT / 'test/kernels/attention_cases.py'), TRITON_INTERPRET='1')
    )


@by_name
def test_triton_backend_equals_the_reference_under_the_interpreter(case, interpreted):
    check(case, interpreted[case.name])


@pytest.mark.gpu
@by_name
def test_triton_backend_equals_the_reference_on_the_gpu(case):
    from stream3r_core.kernels import triton_attention

    check(case, measure(triton_attention.attention, case, 'cuda'))


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stream3r_core.kernels import triton_attention as ta

TENSORS = {'q_ptr', 'k_ptr', 'v_ptr', 'out_ptr'}
for name, dtype, D in (('bf16', torch.bfloat16, 64), ('fp32', torch.float32, 128)):
    constants = {'HAS_BIAS': True, 'INTERPRET': False, **ta._blocks(D, dtype)}
    for kernel in (ta._forward_kernel, ta._column_sum_kernel):
        types = {
            a: 'constexpr' if a in constants else '*' + name if a in TENSORS
            else '*fp32' if a.endswith('_ptr') else 'fp32' if a == 'scale' else 'i32'
            for a in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        made = triton.compile(source, target=GPUTarget('cuda', 80, 32))
        print(len(made.asm['cubin']) > 1000 and made.metadata.shared <= 99 * 1024)
"""


def test_triton_kernels_compile_to_machine_code_of_a_consumer_gpu():
    # Needs no GPU: proves that the kernels compile and fit its shared memory, not that they run.
    assert run_python('-c', COMPILE, TRITON_INTERPRET='0').split() == ['True'] * 4


@pytest.mark.parametrize('bias', [False, True])
def test_attend_and_attend_with_column_sums_agree(bias):
    q, k, v, b = inputs(CASES[0])
    b = b if bias else None
    out, sums = attend_with_column_sums(q, k, v, b)
    torch.testing.assert_close(out, attend(q, k, v, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 2), 130.0), rtol=1e-5, atol=1e-3)


def test_column_sums_do_not_hold_all_logits_at_once():
    # 4096 queries x 4096 keys are 64 MiB of logits; the tiles may take 1 MiB.
    q, k, v = (torch.randn(1, 1, 4096, 16) for _ in range(3))
    with torch.profiler.profile(profile_memory=True) as profile:
        tiled.attention(q, k, v, tile_bytes=1 << 20)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 8 << 20


def test_subsampling_takes_whole_tiles_of_evenly_spaced_queries():
    assert reference.subsample_size(1041, 0.5) == 512
    assert reference.subsample_size(1041, 0.01) == 128
    assert reference.subsample_size(100, 0.5) == 100
    rows, factor = reference.subsample_queries(torch.arange(700.0).view(1, 1, 700, 1), 0.2)
    assert factor == 700 / 128
    assert rows.flatten().diff().unique().tolist() == [5.0, 6.0]


def test_registry_says_which_backend_runs_and_why_others_cannot():
    request = registry.Request('cpu', torch.float32, 64, bias=True, column_sums=True)
    assert registry.explain(request) == {
        'flash-attn': 'does not return column sums',
        'native': 'pays from 8 queries and 256 keys on',
        'blocks': 'does not return column sums',
        'sdpa': 'does not return column sums',
        'triton': 'runs on cuda, not on cpu (interpreter: tests only)',
        'pytorch': 'runs',
    }
    plain = registry.explain(request._replace(bias=False, column_sums=False))
    assert plain['sdpa'] == 'runs'
    assert 'not torch.float32 on cpu' in plain['flash-attn']


def test_triton_is_refused_for_types_that_it_or_the_gpu_cannot_compute_with(monkeypatch):
    def refusal(dtype):
        request = registry.Request('cuda', dtype, head_dim=64, bias=True, column_sums=True)
        return next(b for b in registry.BACKENDS if b.name == 'triton').refusal(request)

    assert 'float32, not torch.float64' in refusal(torch.float64)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7, 5))
    triton_support.unavailable.cache_clear()
    assert '8.0 (Ampere) or newer for bfloat16' in refusal(torch.bfloat16)
    assert 'Ampere' not in (refusal(torch.float16) or '')
    triton_support.unavailable.cache_clear()


def test_choosing_a_backend_on_the_cpu_loads_no_triton():
    code = (
        'import sys, torch; from stream3r_core.attention import attend_with_column_sums as f; '
        'x = torch.ones(1, 1, 2, 16); f(x, x, x); print("triton" in sys.modules)'
    )
    assert run_python('-c', code).strip() == 'False'
