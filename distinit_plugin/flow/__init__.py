"""Optical flow: 8-bit codes, and where they are kept: one file per video, JPEG folders, I3D's arrays."""
