"""Released PyTorch checkpoints to ours and back.

May import `checkpoints`, `models` and what they import. Start with `import_torch.py`.
"""
