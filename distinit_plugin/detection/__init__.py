"""Who does what, where: annotated keyframes, persons' boxes, networks that classify boxes, and frame-mAP."""
