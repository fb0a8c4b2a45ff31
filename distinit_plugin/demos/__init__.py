"""The demonstration: handwritten digits moving over textures, made here, so that nothing has to be downloaded."""
