"""From a folder as it came to one that a training run accepts: look, check, mend, divide."""
