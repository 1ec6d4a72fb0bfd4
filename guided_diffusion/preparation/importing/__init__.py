"""Files of annotation tools to radiographs and index masks, as every command reads them."""
