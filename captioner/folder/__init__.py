"""Runs over many photographs: finding them, describing them, and going on where a run ended."""

from captioner.folder.describe import describe_folder
from captioner.folder.find import find_photographs
from captioner.folder.run import FolderRun, RunError, RunResult, WriteError
from captioner.photos.workers import Found

__all__ = [
    "FolderRun",
    "Found",
    "RunError",
    "RunResult",
    "WriteError",
    "describe_folder",
    "find_photographs",
]
