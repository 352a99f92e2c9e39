"""Whole runs: the drop-in profile, calibration from a checkpoint to statistics, streaming, several processes."""
