"""Many images at once: the .npz files of the sampling scripts."""
