"""Tests of the command line, with fixtures that they share."""
