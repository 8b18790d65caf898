"""Generated test stories, their metrics, and the pages that show them.

May import `sampling`, `data`, `distributed` and what they import. Start with `compare.py` for a few
stories, `sample_split.py` for a complete test split.
"""
