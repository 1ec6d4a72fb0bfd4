"""From a pretrained diffusion U-Net to segmented radiographs."""
