"""The demo: demonstrations of the built-in world, a training on them, and its report."""
