"""Calibration data: from whatever the user gives to rows of tokens."""

from ar_tuner.calibration.grammar import SetRequest, parse_sets
from ar_tuner.calibration.hub import HubSet, Place
from ar_tuner.calibration.report import CalibrationReport, SetReport
from ar_tuner.calibration.rows import calibration_rows, check_dataset, check_ids, check_seqlen
from ar_tuner.calibration.sources import DatasetSource, Query
from ar_tuner.calibration.split import split_rows

__all__ = [
    "CalibrationReport",
    "DatasetSource",
    "HubSet",
    "Place",
    "Query",
    "SetReport",
    "SetRequest",
    "calibration_rows",
    "check_dataset",
    "check_ids",
    "check_seqlen",
    "parse_sets",
    "split_rows",
]
