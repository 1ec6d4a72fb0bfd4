"""From a network to images, and how good they are."""
