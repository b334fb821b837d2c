"""The model card: the README of a repository, from what was measured and nothing else."""

from typing import Any

from treeify.share.sections import counted, sections
from treeify.share.subject import Subject

LIBRARY = "treeify"
_TAGS = ["treeify", "hierarchical-neural-ensemble", "anytime-inference", "image-classification"]
_TASK = ("image-classification", "Image classification")


def card(subject: Subject) -> str:
    """The text of `README.md`: metadata in YAML, then a page of Markdown."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=_TASK[0],
        tags=_TAGS,
        license=subject.licence,
        base_model=subject.base_model,
        model_name=subject.name,
        eval_results=_results(subject) or None,
        metrics=["accuracy"] if subject.result.scores else None,
    )
    metadata = data.to_yaml()
    body = "\n\n".join(filter(None, sections(subject)))
    return f"---\n{metadata}\n---\n\n{body}\n"


def _results(subject: Subject) -> list[Any]:
    """The accuracy of every nested size, as the hub's `model-index` has it: 0 to 1."""
    from huggingface_hub import EvalResult

    result = subject.result
    data_set = result.data_set or result.origin.get("data", "held-out images")
    return [
        EvalResult(
            task_type=_TASK[0],
            task_name=_TASK[1],
            dataset_type=data_set,
            dataset_name=data_set,
            dataset_split="held out",
            metric_type="accuracy",
            metric_name=f"accuracy, {counted(score.leaves)}",
            metric_value=round(score.accuracy / 100, 6),
        )
        for score in result.scores
    ]
