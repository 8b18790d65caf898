"""Several devices and processes: the mesh, sharding rules, and agreement between processes.

May import `config`. Start with `sharding.py`.
"""
