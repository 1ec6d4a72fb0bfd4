"""A process: errors, logs, randomness, signals; below, its command line, files and ranks."""
