"""The compiled attention of CPUs against the readable reference."""

import subprocess

import pytest
import torch
from attention_cases import GATES

from stream3r_core.attention import attend, attend_with_column_sums, explain_stream
from stream3r_core.kernels import native, quantized, reference, registry

HERE = [variant for variant in native.VARIANTS if variant.runs_here()]
with_instructions = pytest.mark.skipif(
    not HERE, reason='this processor has neither AVX2 nor AVX-512'
)


@pytest.fixture(params=HERE or native.VARIANTS, ids=lambda variant: variant.name)
def variant(request, monkeypatch):
    """Use the kernel for one kind of processor; every kind that this one is."""
    monkeypatch.setattr(native, 'VARIANTS', (request.param,))
    for cache in (native._library, native.unavailable, registry.choose):
        cache.cache_clear()
    yield request.param.name
    for cache in (native._library, native.unavailable, registry.choose):
        cache.cache_clear()


SIZES = [(1, 8, 256), (3, 50, 333), (2, 6, 64), (4, 1, 1), (1, 131, 1025)]  # heads, M, N


def inputs(heads, queries, keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries * keys)
    shapes = ((1, heads, n, 64) for n in (queries, keys, keys))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def biases(heads, keys):
    masked = torch.randn(1, heads, 1, keys, generator=torch.Generator().manual_seed(7))
    masked[..., : 2 * keys // 3] = -torch.inf
    return {'none': None, 'shared': masked[:, :1], 'of each head': masked}


def in_slots(x, capacity):
    """Return the same rows as a view of storage with room, as caches hand them over."""
    rubbish = 255 if x.dtype == torch.uint8 else torch.nan
    storage = torch.full((*x.shape[:2], capacity, x.shape[3]), rubbish, dtype=x.dtype)
    storage[:, :, : x.shape[2]] = x
    return storage[:, :, : x.shape[2]]


@with_instructions
@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_output_and_column_sums_equal_the_reference(size, dtype, threads, variant, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    heads, _, keys = size
    q, k, v = inputs(*size, getattr(torch, dtype))
    k, v = in_slots(k, keys + 5), in_slots(v, keys + 5)
    for bias in biases(heads, keys).values():
        got = native.attention(q, k, v, bias, column_sums=True)
        expected = reference.attention(q, k, v, bias)
        assert (got.out - expected.out).abs().max() <= GATES[dtype]
        off = (got.column_sums - expected.column_sums).abs()
        assert (off <= (1e-5 if dtype == 'float32' else 1e-2) * expected.column_sums).all()
        assert torch.equal(got.out, native.attention(q, k, v, bias).out)


@with_instructions
@pytest.mark.parametrize('in_rows', [True, False])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_bytes_equal_the_reference_over_what_the_codes_say(size, in_rows, variant):
    q, k, v = inputs(*size)
    rows = (quantized.of_rows(in_slots(quantized.to_rows(x, 8), size[2] + 3), 8) for x in (k, v))
    k, v = rows if in_rows else (quantized.quantize(x, 8) for x in (k, v))
    for bias in biases(size[0], size[2]).values():
        got = native.attention(q, k, v, bias).out
        expected = reference.attention(q, *map(quantized.dequantize, (k, v)), bias).out
        gate = 4e-2 if variant == 'avx512' else GATES['float32']  # there queries are bytes too
        assert (got - expected).abs().max() <= gate


@with_instructions
@pytest.mark.parametrize('broken', ['large', 'blind', 'nan'])
def test_what_has_no_plain_sum_is_left_to_another_backend(broken, variant):
    q, k, v = inputs(2, 16, 2100)
    bias = None
    if broken == 'large':
        k *= 200.0
    elif broken == 'nan':
        k[0, 0, 3] = torch.nan
    else:
        bias = torch.full((1, 1, 1, 2100), -torch.inf)
    assert native.attention(q, k, v, bias) is None
    with torch.inference_mode():
        assert registry.choose(registry.Request.of(q, k, bias, False)).name == 'native'
        expected = reference.attention(q, k, v, bias)
        out, sums = attend_with_column_sums(q, k, v, bias)
        for got in (attend(q, k, v, bias), out):
            torch.testing.assert_close(got, expected.out, atol=1e-4, rtol=0, equal_nan=True)
        torch.testing.assert_close(sums, expected.column_sums, atol=1e-3, rtol=0, equal_nan=True)


@with_instructions
def test_it_serves_streams_on_a_cpu_and_leaves_the_rest_to_others(variant):
    (q, few, _), (_, many, _) = inputs(2, 16, 300), inputs(2, 16, 2100)
    with torch.inference_mode():
        request = registry.Request.of(q, many, None, column_sums=False)
        short = registry.Request.of(q, few, None, column_sums=False)
    assert native.unavailable() is None
    assert registry.choose(request).name == 'native'
    assert registry.native_refusal(short, bytes_stored=True) is None
    is_fast = variant == 'avx512'
    assert (registry.choose(short).name == 'native') == is_fast
    assert (registry.choose(request._replace(column_sums=True)).name == 'native') == is_fast
    for other in (
        {'gradients': True}, {'batch': 2}, {'bias_by_query': True}, {'keys': 128}, {'queries': 4},
        {'head_dim': 32}, {'dtype': torch.float16}, {'device': 'cuda'},
    ):  # fmt: skip
        assert registry.choose(request._replace(**other)).name != 'native', other


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Forget what was found out about the compiled kernel, before and after."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    caches = native._library, native.unavailable, registry.choose
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@with_instructions
def test_it_is_compiled_once_and_whole(fresh, monkeypatch):
    assert native.unavailable() is None
    made = list((fresh / 'stream3r').iterdir())
    assert [path.suffix for path in made] == ['.so']
    native._library.cache_clear()
    monkeypatch.setattr(subprocess, 'run', lambda *_, **__: pytest.fail('compiled again'))
    native._library()


@with_instructions
@pytest.mark.parametrize(
    'compiler, reason', [('false', 'false cannot compile'), ('/nowhere/cc', 'be compiled')]
)
def test_without_a_working_compiler_others_serve_and_it_is_said(
    fresh, monkeypatch, compiler, reason
):
    monkeypatch.setenv('CC', compiler)
    q, k, v = inputs(2, 16, 2100)
    with torch.inference_mode():
        request = registry.Request.of(q, k, None, column_sums=False)
        assert reason in registry.explain(request)['native']
        expected = reference.attention(q, k, v).out
        torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=0)


def test_without_the_instructions_others_serve_and_it_is_said(fresh, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
    told = explain_stream(torch.device('cpu'), torch.bfloat16, 64, column_sums=False)
    assert told['native'] == 'needs a processor with AVX2 and FMA, or AVX-512'
    assert told['blocks'].startswith('runs with many keys; with few: pays')
    codes = explain_stream(torch.device('cpu'), torch.bfloat16, 64, False, bits=8)
    assert codes == {'native': told['native'], 'blocks': 'runs'}


def test_where_the_compiler_does_not_know_a_processor_the_next_kernel_serves(fresh, monkeypatch):
    first, *others = native.VARIANTS
    unknown = first._replace(flags='-mno-such-instructions', runs_here=lambda: True)
    monkeypatch.setattr(native, 'VARIANTS', (unknown, *others))
    if any(variant.runs_here() for variant in others):
        assert native.unavailable() is None and native.variant_here() == others[0]
    else:
        assert 'cannot compile native_avx512.c' in native.unavailable()


def test_what_is_explained_tells_few_keys_from_many(variant):
    told = explain_stream(torch.device('cpu'), torch.float32, 64, column_sums=False)
    if variant == 'avx512':
        assert told['native'] == 'runs'
    else:
        assert told['native'] == 'runs with many keys; with few: pays from 2048 keys on with avx2'
        assert told['sdpa'] == 'could run with many keys; with few: runs'
