"""A process: flags, files, randomness, signals and the failures of other ranks."""
