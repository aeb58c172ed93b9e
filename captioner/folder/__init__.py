"""Runs over many photographs: finding them, describing them, and going on where a run ended."""

from captioner.folder.run import Found, describe_folder, find_photographs

__all__ = ["Found", "describe_folder", "find_photographs"]
