"""Key/value caches: what a new frame may attend to, and how much memory that costs."""
