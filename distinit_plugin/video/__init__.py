"""From lists of videos to views: corpora, frame indices, decoding, sampling, cropping and resizing."""
