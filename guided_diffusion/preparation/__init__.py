"""Data sets before training: checking, repairing, dividing, describing, generating."""
