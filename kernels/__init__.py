"""Attention kernels and their readable reference; imported as ``stream3r_core.kernels``."""
