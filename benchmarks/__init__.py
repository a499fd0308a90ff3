"""Measurements; every figure in README or results/ comes from one of these commands."""
