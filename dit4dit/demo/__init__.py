"""The demonstration in the built-in world: data from a scripted expert, a policy trained on them, and what it is worth."""
