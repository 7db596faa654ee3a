"""Tests of the modules, with fixtures that they share."""
