"""Calibration data: from whatever the user gives to rows of tokens."""

from ar_tuner.calibration.rows import CalibrationReport, calibration_rows, check_seqlen
from ar_tuner.calibration.sources import DatasetSource

__all__ = ["CalibrationReport", "DatasetSource", "calibration_rows", "check_seqlen"]
