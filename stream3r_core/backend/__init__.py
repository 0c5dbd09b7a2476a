"""Long-range consistency: submaps, loops and a pose graph over any streaming front end."""
