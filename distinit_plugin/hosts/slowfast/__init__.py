"""The adapter to PySlowFast: its own run_net with this package's networks, corpora, teachers and losses.

``boot`` makes a checkout of PySlowFast importable, cures what keeps it from running (``missing``, ``defects``) and
registers everything; ``launching`` starts its processes. PySlowFast's code is never changed: cures are made in memory.
Modules here may import ``slowfast`` inside functions only, after ``boot``.
"""
