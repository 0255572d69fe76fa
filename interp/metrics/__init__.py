"""Metrics of what a model says of images: CHAIR for captions, POPE for yes/no questions.

The functions bear the names of their modules and are bound here at once, as in `interp.tasks`.
"""

from interp.metrics.captions import cut_alike, write_captions
from interp.metrics.chair import Chair, chair, cut_to_recall, first_words, whole_sentences
from interp.metrics.measured import Measured, MetricError, differences, table_of
from interp.metrics.pope import Pope, pope, pope_questions, read_answer, read_answer_as_published
from interp.metrics.published import (
    coco_objects,
    read_answers,
    read_captions,
    read_objects,
    read_questions,
)
from interp.metrics.vocabulary import Mention, Vocabulary, coco, scenes

__all__ = [
    "Chair",
    "Measured",
    "Mention",
    "MetricError",
    "Pope",
    "Vocabulary",
    "chair",
    "coco",
    "coco_objects",
    "cut_alike",
    "cut_to_recall",
    "differences",
    "first_words",
    "pope",
    "pope_questions",
    "read_answer",
    "read_answer_as_published",
    "read_answers",
    "read_captions",
    "read_objects",
    "read_questions",
    "scenes",
    "table_of",
    "whole_sentences",
    "write_captions",
]
