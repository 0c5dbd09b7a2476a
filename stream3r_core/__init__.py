"""Streaming dense reconstruction with causal 3D transformers, in plain PyTorch, without ROS."""

from importlib import import_module

__version__ = '0.1.0'

_HOME_OF = {
    'load_model': 'stream3r_core.checkpoints',
    'ModelConfig': 'stream3r_core.config',
    'StreamSession': 'stream3r_core.session',
    'FramePrediction': 'stream3r_core.types',
    'Stream3rError': 'stream3r_core.errors',
}

__all__ = ['__version__', *_HOME_OF]


def __getattr__(name):
    """Import public names on first use, so that importing the package stays light (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__():
    return sorted(__all__)
