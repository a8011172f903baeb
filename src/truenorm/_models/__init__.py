"""Functions for whole models, a file or a package each, and what they share.

None has the name of its function, which would hide it: `truenorm.freeze` is in `freezing.py`.
"""
