"""The kinds of segmentation network."""
