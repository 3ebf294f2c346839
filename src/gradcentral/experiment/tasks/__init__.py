"""The built-in tasks, one per file, each loaded by its name."""
