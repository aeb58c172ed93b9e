"""From a grid to captions and tags: the search, its options and its rules."""
