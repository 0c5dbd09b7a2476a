"""Keys and values of few bits, and attention in blocks of keys, against the readable reference."""

import json

import pytest
import torch
from attention_cases import CASES as PLAIN
from attention_cases import GATES, inputs
from quantized_cases import CASES, error, name
from test_attention import ROOT, run_python

from stream3r_core.attention import attend
from stream3r_core.kernels import blocked, quantized, reference, registry

by_case = pytest.mark.parametrize('case', CASES, ids=name)


@pytest.mark.parametrize('bits', [8, 4])
def test_a_row_comes_back_within_half_a_step(bits):
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0.0
    rows = quantized.to_rows(x, bits)
    assert rows.shape[-1] == quantized.row_bytes(16, bits) == 16 * bits // 8 + 4
    kept = quantized.of_rows(rows, bits)
    assert kept.scale.data_ptr() - rows.data_ptr() == 16 * bits // 8  # a view
    error = (quantized.dequantize(kept) - x).abs()
    assert (error <= 0.5001 * kept.scale).all()
    assert kept.scale[1, 2, 3] == x[1, 2, 3].abs().max() / quantized.LARGEST[bits]
    assert not quantized.dequantize(kept)[0, 0, 0].any()


@pytest.mark.parametrize('with_bfloat16', [True, False])
@pytest.mark.parametrize('with_bytes', [True, False])
@by_case
def test_attention_on_a_cpu_equals_the_reference_over_what_the_codes_say(
    case, with_bytes, with_bfloat16, monkeypatch
):
    monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: with_bytes)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: with_bfloat16)
    monkeypatch.setattr(blocked, 'BLOCK_BYTES', 1)  # the smallest blocks
    gate = 4e-2 if with_bytes else GATES['bfloat16'] if with_bfloat16 else GATES[case[0].dtype]
    assert error(quantized.attention, case) <= gate


@pytest.fixture(scope='module')
def interpreted():
    """Return the errors of the Triton backend under its interpreter, by case name."""
    program = str(ROOT / 'test/kernels/quantized_cases.py')
    return json.loads(run_python(program, TRITON_INTERPRET='1'))


@by_case
def test_triton_equals_the_reference_over_what_the_codes_say(case, interpreted):
    assert interpreted[name(case)] <= GATES[case[0].dtype]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stream3r_core.kernels import triton_quantized as tq

for codes, packed in (('*i8', False), ('*u8', True)):
    constants = {
        'HAS_BIAS': True, 'INTERPRET': False, 'PACKED': packed,
        'BLOCK_M': 64, 'BLOCK_N': 64, 'BLOCK_D': 32,
    }
    types = {
        a: 'constexpr' if a in constants else codes if a in ('k_ptr', 'v_ptr')
        else '*bf16' if a in ('q_ptr', 'out_ptr') else '*fp32' if a.endswith('_ptr')
        else 'fp32' if a == 'scale' else 'i32'
        for a in tq._kernel.arg_names
    }
    source = ASTSource(fn=tq._kernel, signature=types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget('cuda', 80, 32))
    print(len(made.asm['cubin']) > 1000 and made.metadata.shared <= 99 * 1024)
"""


def test_the_kernel_compiles_to_machine_code_of_a_consumer_gpu():
    # Needs no GPU: proves that it compiles and fits its shared memory, not that it runs.
    assert run_python('-c', COMPILE, TRITON_INTERPRET='0').split() == ['True'] * 2


@pytest.mark.parametrize('scale', [1.0, 40.0])  # 40: weights that overflow without a shift
@pytest.mark.parametrize('case', [c for c in PLAIN if c.dtype != 'float16'], ids=lambda c: c.name)
def test_blocks_of_keys_equal_the_reference(case, scale, monkeypatch):
    monkeypatch.setattr(blocked, 'BLOCK_BYTES', 1)
    q, k, v, bias = inputs(case)
    k = k * torch.linspace(0.1, scale, k.shape[2])[:, None].to(k.dtype)  # the peak comes late
    got, expected = (
        f(q, k, v, bias).out.float() for f in (blocked.attention, reference.attention)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * GATES[case.dtype])


def test_blocks_of_keys_take_a_bias_per_query():
    q, k, v, _ = inputs(PLAIN[0])
    bias = torch.randn(q.shape[2], k.shape[2], generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(blocked.attention(q, k, v, bias).out, expected, atol=1e-5, rtol=0)


def test_blocks_serve_long_streams_on_a_cpu_and_leave_gradients_to_the_fused_kernel():
    q, k, v = torch.randn(3, 1, 1, 4, 16).unbind()
    few = registry.Request.of(q, k, None, column_sums=False)
    assert registry.choose(few).name == 'sdpa'
    many = few._replace(long_cache=True, gradients=False)
    assert registry.choose(many).name == 'blocks'
    assert registry.choose(many._replace(gradients=True)).name == 'sdpa'
    assert registry.choose(many._replace(device='cuda')).name == 'sdpa'
    with torch.inference_mode():
        q, k, v = (torch.randn(1, 1, n, 16) for n in (256, 4096, 4096))
        assert registry.choose(registry.Request.of(q, k, None, False)).name == 'blocks'
        assert not registry.Request.of(k, k, None, False).long_cache  # many queries
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=0)
