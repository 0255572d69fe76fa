"""Interventions: frozen descriptions of an edit, applied by `model.intervene(...)`."""
