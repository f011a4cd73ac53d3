"""Figures of runs, of their evaluation reports, and of several runs."""
