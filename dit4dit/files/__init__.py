"""Files on disk: written whole or not at all, JSON and YAML read and checked, and where the caches are."""
