"""Opening, writing and checking a checkpoint in any layout, and which robot it is for."""
