"""Errors, the command line, atomic files and Ctrl-C: what has nothing to do with stories.

Imports nothing of ours.
"""
