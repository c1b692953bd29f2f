"""Substrate: operators, contracts, devices, formats, tuning, environment. Imports nothing of ours."""
