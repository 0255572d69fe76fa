"""Harnesses that measure a hooked model, interventions and all, as they measure any other."""
