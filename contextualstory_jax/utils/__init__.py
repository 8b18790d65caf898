"""Errors, command line, atomic writes, progress bar and Ctrl-C handling, independent of stories.

Imports no other folder of the package.
"""
