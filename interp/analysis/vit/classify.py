"""How well an image classifier does, as it is now, interventions and all."""

import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from interp.analysis.vit_heads import VitHeadsError, targets_of
from interp.evaluation import Evaluation
from interp.model.hooked import HookedModel
from interp.model.image_replay import has_classifier, look
from interp.model.pictures import Pictures
from interp.model.towers import sees_only


def classify(
    model: HookedModel, images, labels=None, *, batch_size: int = 64, progress: bool = True
) -> Evaluation:
    """One row an image: `target`, `predicted`, `correct`, `loss` (nats); accuracy with Wilson's.

    Images and labels as in `vit_heads`; here labels must be known. Several results go into an
    `interp.evaluation.Comparison`, which gives differences paired by image.

    Raises `VitHeadsError` without labels or a classifier.
    """
    if not sees_only(model) or not has_classifier(model):
        raise VitHeadsError(f"model: {model.name} is no image classifier.")
    pictures = Pictures.of(model, images)
    targets, how = targets_of(model, images, labels, len(pictures))
    if targets is None:
        raise VitHeadsError("labels: none, and the images have no column 'target' or 'label'.")
    found = [
        look(model, inputs["pixel_values"]).logits.float().cpu()
        for inputs in pictures.batches(batch_size, "classify" if progress else None)
    ]
    logits = torch.cat(found)
    predicted = logits.argmax(-1)
    table = pd.DataFrame(
        {
            "target": targets.numpy(),
            "predicted": predicted.numpy(),
            "correct": (predicted == targets).numpy(),
            "loss": cross_entropy(logits, targets, reduction="none").numpy(),
        }
    )
    metadata = {"images": pictures.describe(), "labels": how, **model.provenance()}
    return Evaluation(table, metadata)
