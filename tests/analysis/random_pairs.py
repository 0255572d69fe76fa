"""Pairs of random prompts for tests: as `interp.tasks.pairs` makes them, without a task."""

import torch
from datasets import Dataset

from tests.tiny import N_WORDS, random_ids, words


def random_pairs(*lengths: int, seed: int = 0, changed: int = 2) -> Dataset:
    """One pair for each length; `changed` tokens differ. Positions `first` and `last`."""
    generator = torch.Generator().manual_seed(seed + 1)
    clean = random_ids(*lengths, seed=seed)
    corrupted, answers = [], []
    for ids in clean:
        other = list(ids)
        for place in torch.randperm(len(ids), generator=generator)[:changed].tolist():
            other[place] = 3 + (ids[place] - 3 + 7) % (N_WORDS - 3)
        corrupted.append(other)
        answers.append((3 + torch.randperm(N_WORDS - 3, generator=generator)[:2]).tolist())
    return Dataset.from_dict(
        {
            "text": [words(ids) for ids in clean],
            "input_ids": clean,
            "answer": [" " + words([right]) for right, _ in answers],
            "answer_ids": [[right] for right, _ in answers],
            "clean_text": [words(ids) for ids in clean],
            "clean_input_ids": clean,
            "corrupted_text": [words(ids) for ids in corrupted],
            "corrupted_input_ids": corrupted,
            "answers": answers,
            "positions": [{"first": 0, "last": len(ids) - 1} for ids in clean],
        }
    )
