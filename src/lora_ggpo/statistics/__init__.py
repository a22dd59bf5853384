"""Intervals, tests and scores over seeds: what reports, comparisons and analyses share."""
