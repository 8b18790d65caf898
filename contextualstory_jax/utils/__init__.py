"""Errors, command line, atomic writes and Ctrl-C handling, independent of stories.

Imports no other folder of the package.
"""
