"""Fused normalisation and rotation against the plain one."""

import json

from test_attention import ROOT, run_python

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stream3r_core.kernels import triton_rotary as tr

constants = {'BLOCK_N': 32, 'BLOCK_D': 64}
types = {
    a: 'constexpr' if a in constants else '*bf16' if a in ('x_ptr', 'out_ptr')
    else '*fp32' if a.endswith('_ptr') else 'fp32' if a == 'eps' else 'i32'
    for a in tr._kernel.arg_names
}
source = ASTSource(fn=tr._kernel, signature=types, constexprs=constants)
print(len(triton.compile(source, target=GPUTarget('cuda', 80, 32)).asm['cubin']) > 1000)
"""


def test_fused_rotation_equals_the_plain_one_under_the_interpreter():
    program = str(ROOT / 'test/kernels/rotary_cases.py')
    *exact, narrow = json.loads(run_python(program, TRITON_INTERPRET='1'))
    assert max(exact) < 1e-5
    assert narrow <= 2**-7  # one step of bfloat16


def test_the_fused_rotation_compiles_to_machine_code_of_a_consumer_gpu():
    # Needs no GPU: proves that it compiles, not that it runs.
    assert run_python('-c', COMPILE, TRITON_INTERPRET='0').strip() == 'True'
