"""Attention functions over slots, one file per kernel."""
