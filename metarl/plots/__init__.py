"""Figures: single runs, evaluation reports, comparisons of runs."""
