"""Opening and writing checkpoints of any layout: published run folders, Cosmos folders, the native format, the hub."""
