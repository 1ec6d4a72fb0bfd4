"""From masks to figures: Dice, IoU, calibration, label efficiency."""
