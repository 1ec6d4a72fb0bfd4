"""From a few labelled images to a model file."""
