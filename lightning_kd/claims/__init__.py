"""Claims of papers as small experiments: what is run, and whether the claim shows in it.

``lightning-kd claim NAME`` is made of this. Neither torch nor lightning is imported here: the runs are processes of
their own.
"""
