"""Prunus finds the smaller networks inside a pretrained language model."""
