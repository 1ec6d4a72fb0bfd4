"""Trained networks as folders that others can use."""
