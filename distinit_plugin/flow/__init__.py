"""Optical flow: back ends behind one interface, error measures, pictures."""
