"""Metrics, dataset readers, suites and reports; see the modules."""
