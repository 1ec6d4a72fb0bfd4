"""A process: flags, files, randomness, signals, ranks and their failures."""
