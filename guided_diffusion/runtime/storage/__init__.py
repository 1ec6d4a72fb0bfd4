"""What is left on disk: complete files, checkpoints, locks, hashes of contents."""
