"""Workflows: YAML files that describe fork-joins, and running them one after the other (docs/workflows.md)."""

from pyps.workflow.file import Step, Workflow, read_workflow, set_variables, shipped_workflows
from pyps.workflow.run import StepEvent, outcome, run_workflow

__all__ = [
    "Step",
    "StepEvent",
    "Workflow",
    "outcome",
    "read_workflow",
    "run_workflow",
    "set_variables",
    "shipped_workflows",
]
