"""Fails where the host would wait for a GPU, on machines without one."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def forbid_waiting():
    """Fail at every operation that would make the host wait for a GPU.

    Not seen: ``.to('cpu')``, which does nothing where the tensors of a test are.
    """
    with _ForbidMethods(), _ForbidOperations():
        yield


class _ForbidMethods(TorchFunctionMode):
    """What tells the host values; on the CPU some of it never becomes an operation."""

    WAITING = ('tolist', 'cpu', 'numpy', '__array__', 'item', 'allclose')

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        assert name not in self.WAITING, f'{name} waits for the device'
        return func(*args, **(kwargs or {}))


class _ForbidOperations(TorchDispatchMode):
    """Operations whose result, or its shape, the host must know.

    ``lift_fresh`` is how a tensor is made of Python numbers: of a list, say of indices, it is a
    copy to the GPU which the host waits for; a single number goes along with the kernel.
    """

    WAITING = (
        '_local_scalar_dense', 'nonzero', 'is_nonzero', 'masked_select', 'unique', '_unique',
        'bincount', 'equal', '_linalg_check_errors',
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split('::')[1]
        waits = (
            name.startswith(self.WAITING)
            or (name == 'lift_fresh' and args[0].ndim)
            or (name in ('index', 'index_put', 'index_put_') and _by_mask(args[1]))
            or (name == 'repeat_interleave' and func._overloadname == 'Tensor')
        )
        assert not waits, f'{name} waits for the device'
        return func(*args, **(kwargs or {}))


def _by_mask(indices):
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
