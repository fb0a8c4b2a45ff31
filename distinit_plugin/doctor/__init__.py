"""``distinit doctor``: what works on this machine, what does not, and what to do about it.

Each check runs in a process that may crash; this package itself imports nothing that could.
"""
