"""How lmms-eval reads `scenes.parquet`, and how it scores what a model wrote."""


def images(doc):
    """The picture, as a list."""
    return [doc["image"]]


def question(doc, lmms_eval_specific_kwargs=None):
    """What is asked."""
    return doc["question"]


def right(doc):
    """Which of the choices is right."""
    return doc["choices"].index(doc["answer"])


def score(doc, results):
    """Does the answer begin with the right word? Of yes-or-no questions: does it say yes?"""
    words = results[0].replace(".", " ").replace(",", " ").split()
    said = words[0].lower() if words else ""
    found = {"right": float(said == doc["answer"].lower())}
    asks = doc["kind"] == "exists"
    return found | {"said_yes": float(said == "yes") if asks else None}


def share(values):
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")
