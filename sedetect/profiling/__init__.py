"""Whole runs: the drop-in profile, calibration from a checkpoint to statistics, streaming, several processes.

These modules decide what runs, on which text, and when it ends. Attaching and measuring experts belongs in models,
conclusions from statistics in ranking.
"""
