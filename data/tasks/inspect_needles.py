"""Needles, written, for inspect_ai: does the model go on with the code that the text gives?

inspect eval data/tasks/inspect_needles.py --model interp/smollm2-135m -M chat=false
"""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def needles() -> Task:
    """The rows of `needles.jsonl`; right where the code is what comes first."""
    rows = str(Path(__file__).with_name("needles.jsonl"))
    return Task(
        dataset=json_dataset(rows, FieldSpec(input="text", target="answer")),
        solver=generate(),
        scorer=match(location="begin"),
        config=GenerateConfig(max_tokens=12, stop_seqs=["."]),
    )
