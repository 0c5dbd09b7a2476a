"""Attention of few queries to many keys on x86-64 processors, in C.

PyTorch has no product of bfloat16 matrices with float32 results on a CPU, and its fused kernel
reaches about half of what a processor can (benchmarks/RESULTS.md). The file for this processor is
compiled once, in about a second, with the C compiler of the machine; without one, or without the
instructions, other backends serve.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.kernels.processor import has_bfloat16
from stream3r_core.kernels.quantized import Quantized
from stream3r_core.kernels.reference import LOG2_E, Attention

WIDTH = 64  # of a head; the published networks have no other
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
HEADER = Path(__file__).with_name('native_attention.h')
COMMON = '-O3 -shared -fPIC -pthread -mfma'
LARGEST, SMALLEST = 2.0**100, 2.0**-100  # sums of weights beyond need a shift of the logits


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ('kind', 'heads', 'queries', 'threads')),
        *((name, ctypes.c_int64) for name in ('keys', 'head_stride', 'row_stride', 'bias_stride')),
        *(
            (name, ctypes.c_void_p)
            for name in ('q', 'k', 'v', 'bias', 'log_total', 'out', 'total', 'columns')
        ),
    ]


class Variant(NamedTuple):
    """The kernel for one kind of processor."""

    name: str
    flags: str
    runs_here: Callable[[], bool]
    min_keys: int  # below, PyTorch's own attention is as fast; keys of bytes pay in any case
    has_fast_column_sums: bool  # it computes the logits twice for them

    @property
    def source(self) -> Path:
        """The file in C; it includes :data:`HEADER`."""
        return HEADER.with_name(f'native_{self.name}.c')

    @property
    def command(self) -> list[str]:
        """Options of the compiler."""
        return [*COMMON.split(), *self.flags.split()]

    @property
    def fingerprint(self) -> str:
        """Of all that the compiled file depends on, but for the compiler."""
        text = HEADER.read_bytes() + self.source.read_bytes() + ' '.join(self.command).encode()
        return hashlib.sha256(text).hexdigest()[:16]


def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith('AVX')  # AVX2 and FMA, or more


#: In order of preference. With AVX-512 bytes and bfloat16 are multiplied as such, else in float32.
VARIANTS = (
    Variant(
        'avx512',
        '-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16',
        lambda: has_bfloat16() and torch.cpu._is_vnni_supported(),
        min_keys=256,
        has_fast_column_sums=True,
    ),
    Variant('avx2', '-mavx2', _has_avx2, min_keys=2048, has_fast_column_sums=False),
)


class _UnavailableError(Exception):
    """Why there is no compiled kernel."""


@functools.cache
def unavailable() -> str | None:
    """Return why the compiled kernel cannot run here, or None when it can."""
    try:
        _library()
    except _UnavailableError as error:
        return str(error)
    return None


def variant_here() -> Variant:
    """Return the kernel that serves on this processor; where none does, nobody may ask."""
    return _library()[0]


@functools.cache
def _library() -> tuple[Variant, ctypes.CDLL]:
    """Return the first kernel that processor, compiler and loader take."""
    reasons = []
    for variant in VARIANTS:
        if variant.runs_here():
            try:
                return variant, _loaded(variant)
            except _UnavailableError as error:
                reasons.append(str(error))
    raise _UnavailableError(
        '; '.join(reasons) or 'needs a processor with AVX2 and FMA, or AVX-512'
    )


def _loaded(variant: Variant) -> ctypes.CDLL:
    path = _folder() / f'attention-{variant.fingerprint}.so'
    if not path.exists():
        _compile(variant, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _UnavailableError(f'{path} does not load: {error}') from error


def _folder() -> Path:
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(root) / 'stream3r'


def _compile(variant: Variant, path: Path) -> None:
    """Compile into ``path``, whole or not at all: several processes may do so at once."""
    compiler = os.environ.get('CC') or shutil.which('cc') or shutil.which('gcc')
    if compiler is None:
        raise _UnavailableError('needs a C compiler (cc), once')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [compiler, *variant.command, '-o', made, variant.source],
                check=True, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            made.replace(path)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ['no message'])[0]
        raise _UnavailableError(
            f'{compiler} cannot compile {variant.source.name}: {reason}'
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _UnavailableError(f'{variant.source.name} could not be compiled: {error}') from error


def attention(
    q: Tensor,  # [1, H, M, 64]
    k: Tensor | Quantized,  # [1, H, N, 64]
    v: Tensor | Quantized,  # [1, H, N, 64]
    bias: Tensor | None = None,  # broadcastable to [1, H, 1, N]
    column_sums: bool = False,
) -> Attention | None:
    """Return softmax(q k^T / sqrt(D) + bias) v, sums in float32, and the column sums on request.

    With AVX-512, products are those of the type of the keys: float32, bfloat16, or bytes for the
    logits and bfloat16 for the values; without, all are float32. None where the sums of 2^logits
    leave the range of float32: another backend must serve then.
    """
    scaled = (q.float() * (q.shape[-1] ** -0.5 * LOG2_E)).contiguous()
    (k, v), num_keys = _rows(k, v), (k.codes if isinstance(k, Quantized) else k).shape[2]
    if bias is not None:
        bias = (bias.float() * LOG2_E).expand(1, bias.shape[1], 1, num_keys).contiguous()
    out, total = torch.empty_like(scaled), torch.empty(scaled.shape[:3])
    job = _Job(
        kind=KINDS[k.dtype], heads=q.shape[1], queries=q.shape[2],
        threads=torch.get_num_threads(), keys=num_keys,
        head_stride=k.element_size() * k.stride(1), row_stride=k.element_size() * k.stride(2),
        q=scaled.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
        out=out.data_ptr(), total=total.data_ptr(),
    )  # fmt: skip
    if bias is not None:
        job.bias, job.bias_stride = bias.data_ptr(), num_keys * (bias.shape[1] > 1)
    _run(job)
    if not bool(((total > SMALLEST) & (total < LARGEST)).all()):
        return None
    sums = None
    if column_sums:
        log_total, sums = total.log2(), torch.empty(1, q.shape[1], num_keys)
        job.log_total, job.columns = log_total.data_ptr(), sums.data_ptr()
        _run(job)
    return Attention((out / total[..., None]).to(q.dtype), None, sums)


def _run(job: _Job) -> None:
    if _library()[1].attention(ctypes.byref(job)):
        raise MemoryError('no memory for the workspace of attention')


def _rows(k: Tensor | Quantized, v: Tensor | Quantized) -> tuple[Tensor, Tensor]:
    """Return keys and values in memory alike: whole rows, the scale of bytes behind them."""
    k, v = (_beside_scale(x) if isinstance(x, Quantized) else x for x in (k, v))
    if k.stride() == v.stride() and k.stride(3) == 1:
        return k, v
    if k.dtype == torch.int8:  # no view of rows: their scales lie behind them
        return k, v
    return k.contiguous(), v.contiguous()


def _beside_scale(x: Quantized) -> Tensor:
    is_row = (
        x.codes.stride() == (*(4 * s for s in x.scale.stride()[:3]), 1)
        and x.scale.data_ptr() == x.codes.data_ptr() + WIDTH
    )
    if is_row:
        return x.codes
    rows = torch.cat((x.codes.view(torch.uint8), x.scale.contiguous().view(torch.uint8)), -1)
    return rows.view(torch.int8)[..., :WIDTH]
