"""Files of annotation tools as plain data: classes, and what was drawn on each image."""
