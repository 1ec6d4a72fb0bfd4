"""Few-label segmentation: the model file, its classes and its metrics."""
