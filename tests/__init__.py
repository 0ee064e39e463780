"""Tests; see CONTRIBUTING.md for what lives where."""
