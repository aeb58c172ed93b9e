"""A page to drop photographs on, and an HTTP call that describes them (the extra ``serve``)."""
