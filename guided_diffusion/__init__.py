"""Pretrain a diffusion model on unlabelled radiographs, segment with a handful of labelled ones."""
