"""A stand-in for Koji's hub and builder, for tests; start with standin.py.

Written from what a real hub answers (../traces) and what its documentation says: nothing
of Koji's is in it. The hub's plugins, the builder's and the command line are the real ones,
and so is the `koji` library that all of them talk through.
"""
