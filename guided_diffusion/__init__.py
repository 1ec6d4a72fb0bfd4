"""Pretrain a diffusion model on unlabelled radiographs, segment with a handful of labelled ones."""

from guided_diffusion.runtime import moved

moved.install()
