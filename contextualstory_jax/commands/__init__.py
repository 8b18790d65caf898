"""Subcommands of the program, but for the modules train, generate and evaluate above this folder.

Two modules are parts of generate: its command line (`generate_arguments.py`), and the stories and
frames that it asks for (`generate_plan.py`).

May import every folder. Start with `../__main__.py`.
"""
