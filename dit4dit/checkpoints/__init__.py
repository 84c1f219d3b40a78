"""Opening, writing and checking a checkpoint in any layout."""
