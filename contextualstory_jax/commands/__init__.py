"""Subcommands of the program, but for the modules train, generate and evaluate above this folder.

May import every folder. Start with `../__main__.py`.
"""
