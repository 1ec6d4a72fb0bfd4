"""Files of annotation tools: reading them to masks, and writing masks to them."""
