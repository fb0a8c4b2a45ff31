"""Optical flow: what computes it, 8-bit codes, and where they are kept; error measures, pictures."""
