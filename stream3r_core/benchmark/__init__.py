"""Speed and memory of a stream, measured, and what arithmetic alone would cost."""
