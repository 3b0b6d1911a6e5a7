"""Plug-ins for other people's engines, one file each."""
