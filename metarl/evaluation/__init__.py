"""Evaluation: held-out tasks, Meta-World's own protocol, ablations of memory, single-task references."""

from metarl.build import distribution_of, family_names
from metarl.evaluation.held_out import Report, adapt_to, evaluate, evaluate_agent, held_out_metrics, select_tasks
from metarl.evaluation.metaworld_protocol import MetaWorldAgent

__all__ = [
    "MetaWorldAgent",
    "Report",
    "adapt_to",
    "distribution_of",
    "evaluate",
    "evaluate_agent",
    "family_names",
    "held_out_metrics",
    "select_tasks",
]
