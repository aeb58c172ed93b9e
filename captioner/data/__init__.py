"""Training data: annotation files, vocabularies, tags, batches."""
