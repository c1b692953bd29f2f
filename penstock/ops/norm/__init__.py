"""Normalisation of the last dimension: rms_norm, add_rms_norm."""
