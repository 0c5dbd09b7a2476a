"""The memory of a GPU that others use as well: how much is taken, and what happens without any."""

import logging

import torch

_log = logging.getLogger(__name__)
#: What cuBLAS, cuDNN, the CUDA runtime and other libraries say in a plain RuntimeError.
_NO_ROOM = ('out of memory', 'STATUS_ALLOC_FAILED')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU had no room, whichever library raised it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_ROOM)


def free_gpu_memory(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to the GPU, for others to use."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def limit_gpu_memory(fraction: float, device: torch.device) -> None:
    """Let this process take at most a fraction of a GPU's memory; a CPU has no such limit."""
    if device.type == 'cuda':
        torch.cuda.set_per_process_memory_fraction(fraction, device.index)
    else:
        _log.warning('model.max_gpu_memory has no effect: the network runs on %s', device)
