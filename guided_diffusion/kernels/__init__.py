"""Kernels for processors with AVX-512, compiled when the package is installed.

Where the compiled library or the instructions are missing, torch's own operations are used.
"""
