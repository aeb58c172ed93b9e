"""Photographs: any file as plain RGB, and the processes that read many."""
