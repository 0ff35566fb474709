"""Compute kernels: each file is a front door, a reference and its backends."""
