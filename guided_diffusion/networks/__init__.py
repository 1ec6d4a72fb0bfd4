"""Configuration to network to checkpoint, and back."""
