"""Masks to files of annotation tools."""
