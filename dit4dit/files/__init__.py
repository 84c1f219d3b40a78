"""Files: written atomically, read with errors that name the key, and the folder of caches."""
