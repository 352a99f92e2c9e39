"""Whole runs: the drop-in profile, calibration from a checkpoint to statistics, streaming, several processes.

What decides what runs, on which text, and when it ends. How experts are attached and measured belongs in models, what
the statistics say in ranking.
"""
