"""From a model file to masks."""
