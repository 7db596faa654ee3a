"""Tests of the data, with fixtures that they share."""
