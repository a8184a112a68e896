"""Claims of papers as small experiments: running them, and judging whether the claim holds.

``lightning-kd claim NAME`` uses this. Neither torch nor lightning is imported here: each run is a process of its own.
"""
