"""A checkpoint as others can trust and serve it: `lowbit release`."""
