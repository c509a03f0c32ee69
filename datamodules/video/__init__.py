"""Video: from files to rows of patches or tokens."""
